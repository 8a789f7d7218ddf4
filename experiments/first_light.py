"""First light: both families learn to translate real locale phrases, English to German.

Question  At equal training FLOPs a step, on the same examples in the same steps and by one recipe: who learns what?
Data      `cldr_translate/en_de`, made from Unicode CLDR: dates, times, units, amounts, ranges, names.
Command   make demo    (or: twinstack run first_light)
Sizes     Each stack of the encoder-decoder has as many layers as the decoder-only model; d_ff makes FLOPs equal.

Both learning rates come from one sweep: validation loss (nats per token) after 200 steps of 16 rows, as many examples
as 400 steps here, with one seed and everything else as below (2026-11-23).

    peak      t5like    gpt
    1e-3      0.952     1.118
    2e-3      0.780     0.960
    4e-3      1.206     1.080
"""

from common.compute.matching import match_training_flops
from common.data.config import DataConfig, SentencePieceConfig
from common.data.objectives.config import Supervised
from common.data.sources.config import SourceConfig
from common.recipe import Execution, Recipe
from common.report.claims import Parity
from common.train.config import AdamW, Budget, Linear, TrainConfig
from experiments.families import GPT, T5LIKE
from experiments.run import Evaluation, Run
from experiments.study import Study


def first_light() -> Study:
    recipe = Recipe(positions="rope", mlp="swiglu", init="fan_in")
    data = DataConfig(
        source=SourceConfig(name="tfds:cldr_translate/en_de", inputs="en", targets="de", group="kind"),
        tokenizer=SentencePieceConfig(vocab_size=1024, split_digits=True, byte_fallback=False, character_coverage=1.0),
        objective=Supervised(),
        rows=8,
        input_length=64,
        target_length=64,
    )
    gpt = GPT.sized(width=192, layers=4, d_ff=512, vocab_size=1024, recipe=recipe)
    t5like = T5LIKE.sized(width=192, layers=4, d_ff=512, vocab_size=1024, recipe=recipe)
    train = TrainConfig(
        budget=Budget(unit="steps", amount=1300),
        optimizer=AdamW(),
        schedule=Linear(warmup_steps=60),
        validate_every=130,
        checkpoint_every=325,
        execution=Execution(dtype="float32", scan_layers=False),
    )
    evaluation = Evaluation(
        splits=("test", "test_unseen_names"), examples=4000, rows=125, max_new_tokens=64, validation_batches=32
    )
    t5like = match_training_flops(t5like, gpt, data.length_sums, multiple=8)
    return Study(
        name="first_light",
        question="At equal compute, which learns more of translating phrases: encoder-decoder or decoder-only?",
        expected=(
            "Seen on 2 cores of an AMD EPYC (2026-11-23, one seed): exact match 97 % (t5like) and 95 % (gpt) on 4,000 "
            "held-out phrases, near 100 % on dates, times, units and amounts, less on names, none on names never seen; "
            "7 minutes of training, 10 in all."
        ),
        parity=(Parity(apart=("model.input_attention",)),),
        arms={
            model.kind: Run(
                model=model,
                learning_rate=2e-3,
                data=data,
                train=train,
                evaluation=evaluation,
                labels={"family": model.kind},
            )
            for model in (t5like, gpt)
        },
    )
