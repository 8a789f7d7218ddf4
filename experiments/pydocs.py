"""Pretraining on Python's own documentation: the objectives of T5 and UL2 on real text, with no download.

Question  After a short pretraining by span corruption, at equal training FLOPs: which family predicts spans better?
Data      `tfds:pydocs`: the language reference, docstrings and library text of the running Python, split by module.
Command   twinstack compare pydocs
          twinstack data show pydocs data.target_length=256 data.objective.kind=KIND    (of the objectives, see README)
Rates     Those of multi30k's sweep; not swept here.
Sizes     Rows as long as T5's table of lengths has them for 256 inputs; models as small as a laptop trains in minutes.
"""

from common.compute.matching import match_training_flops
from common.compute.moments import Moments
from common.data.config import DataConfig, SentencePieceConfig
from common.data.objectives.config import SpanCorruption
from common.data.sources.config import SourceConfig
from common.nn.recipe import Execution, Recipe
from common.train.config import AdamW, Budget, Linear, TrainConfig
from experiments.config import Arm, Evaluation, Experiment
from experiments.registry import EXPERIMENTS
from gpt.config import GptConfig
from t5like.config import T5LikeConfig


def pydocs() -> Experiment:
    recipe = Recipe(positions="rope", mlp="swiglu", init="fan_in")
    data = DataConfig(
        source=SourceConfig(name="tfds:pydocs", inputs=None, targets=None, text="text"),
        tokenizer=SentencePieceConfig(vocab_size=4096, sentinels=100),
        objective=SpanCorruption(),
        rows=8,
        input_length=256,
        target_length=58,
    )
    gpt = GptConfig(
        vocab_size=4096, num_layers=4, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=512, recipe=recipe
    )
    t5like = T5LikeConfig(
        vocab_size=4096,
        encoder_layers=4,
        decoder_layers=4,
        d_model=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=512,
        recipe=recipe,
    )
    text = Moments.of_rows(data.rows, data.input_length, data.target_length)
    return Experiment(
        name="pydocs",
        question=EXPERIMENTS["pydocs"],
        expected=(
            "Seen on 2 cores of an AMD EPYC (2026-11-23, one seed): validation loss 3.29 (t5like) and 3.55 "
            "(gpt) nats a token of the spans; 8 minutes of training with other work beside it."
        ),
        varies=("model.input_attention",),
        data=data,
        train=TrainConfig(
            budget=Budget(unit="steps", amount=600),
            optimizer=AdamW(),
            schedule=Linear(warmup_steps=60),
            validate_every=100,
            checkpoint_every=300,
            execution=Execution(dtype="float32", scan_layers=False),
        ),
        evaluation=Evaluation(splits=(), examples=1, rows=1, max_new_tokens=1, validation_batches=64),
        arms={
            "t5like": Arm(model=match_training_flops(t5like, gpt, text, multiple=8), learning_rate=4e-3),
            "gpt": Arm(model=gpt, learning_rate=4e-3),
        },
    )
