"""Multi30k: English to German captions, both families at equal compute, on one small CPU-sized budget.

Question  On a real translation set, at equal training FLOPs a step and by one recipe: what BLEU does each family reach?
Data      Multi30k (Elliott et al. 2016, arXiv 1605.00459), 29,000 training captions, from `$TWINSTACK_SHARED_DATA`.
Command   twinstack run multi30k    (on an accelerator: twinstack run multi30k_accelerator)
Sizes     4 + 4 layers of width 128, about the smallest that translates this set well (Wu et al. 2021, arXiv 2105.14462,
          use such a model); the encoder-decoder's d_ff makes training FLOPs equal.
Baseline  The BLEU of copying the source, which the report shows for every split.

Both learning rates come from one sweep: validation loss (nats per token) after one epoch of 450 steps, with one seed, a
warm-up of 100 steps and everything else as below (2026-11-23).

    peak      t5like    gpt
    2e-3      3.879     3.663
    4e-3      3.740     3.468
    8e-3      3.754     3.572
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


def multi30k() -> Study:
    recipe = Recipe(positions="rope", mlp="swiglu", init="fan_in", dropout=0.1)
    data = DataConfig(
        source=SourceConfig(name="corpus:multi30k", inputs="en", targets="de"),
        tokenizer=SentencePieceConfig(vocab_size=4096),
        objective=Supervised(),
        rows=8,
        input_length=128,
        target_length=128,
    )
    gpt = GPT.sized(width=128, layers=4, vocab_size=4096, recipe=recipe)
    t5like = T5LIKE.sized(width=128, layers=4, vocab_size=4096, recipe=recipe)
    train = TrainConfig(
        budget=Budget(unit="steps", amount=3200),
        optimizer=AdamW(),
        schedule=Linear(warmup_steps=200),
        validate_every=320,
        checkpoint_every=640,
        execution=Execution(dtype="float32", scan_layers=False),
    )
    evaluation = Evaluation(
        splits=("test_2016_flickr",),
        examples=1000,
        rows=125,
        max_new_tokens=80,
        validation_batches=32,
        headline="bleu",
    )
    t5like = match_training_flops(t5like, gpt, data.length_sums, multiple=8)
    return Study(
        name="multi30k",
        question="On real captions, English to German, at equal compute: what BLEU does each family reach?",
        expected=(
            "Seen on 2 cores of an AMD EPYC (2026-11-23, one seed): BLEU 25.8 (t5like) and 29.6 (gpt) on "
            "test_2016_flickr, where copying the source scores 0.48; 44 minutes of training with other work beside it."
        ),
        parity=(Parity(apart=("model.input_attention",)),),
        arms={
            model.kind: Run(
                model=model,
                learning_rate=4e-3,
                data=data,
                train=train,
                evaluation=evaluation,
                labels={"family": model.kind},
            )
            for model in (t5like, gpt)
        },
    )
