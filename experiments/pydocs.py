"""Pretraining on Python's own documentation: the objectives of T5 and UL2 on real text, with no download.

Question  After a short pretraining by span corruption, at equal training FLOPs: which family predicts spans better?
Data      `tfds:pydocs`: the language reference, docstrings and library text of the running Python, split by module.
Command   twinstack compare pydocs
          twinstack data show pydocs data.target_length=256 data.objective.kind=KIND    (of the objectives, see README)
Rates     Those of multi30k's sweep; not swept here.
Sizes     Rows as long as T5's table of lengths has them for 256 inputs; models as small as a laptop trains in minutes.
"""

import dataclasses

from common.compute.length_sums import LengthSums
from common.compute.matching import match_training_flops
from common.data.config import SentencePieceConfig
from common.data.objectives.config import SpanCorruption
from common.data.sources.config import SourceConfig
from common.train.config import Budget, Linear
from experiments.config import Arm, Evaluation, Experiment
from experiments.multi30k import multi30k
from experiments.registry import EXPERIMENTS
from gpt.config import GptConfig
from t5like.config import T5LikeConfig


def pydocs() -> Experiment:
    base = multi30k()
    gpt, t5like = base.arms["gpt"].model, base.arms["t5like"].model
    assert isinstance(gpt, GptConfig) and isinstance(t5like, T5LikeConfig)
    recipe = dataclasses.replace(gpt.recipe, dropout=0.0)
    gpt, t5like = (dataclasses.replace(gpt, recipe=recipe), dataclasses.replace(t5like, recipe=recipe))
    data = dataclasses.replace(
        base.data,
        source=SourceConfig(name="tfds:pydocs", inputs=None, targets=None, text="text"),
        tokenizer=SentencePieceConfig(vocab_size=4096, sentinels=100),
        objective=SpanCorruption(),
        input_length=256,
        target_length=58,
    )
    text = LengthSums.of_rows(data.rows, data.input_length, data.target_length)
    return dataclasses.replace(
        base,
        name="pydocs",
        question=EXPERIMENTS["pydocs"],
        expected=(
            "Seen on 2 cores of an AMD EPYC (2026-11-23, one seed): validation loss 3.29 (t5like) and 3.55 "
            "(gpt) nats a token of the spans; 8 minutes of training with other work beside it."
        ),
        data=data,
        train=dataclasses.replace(
            base.train,
            budget=Budget(unit="steps", amount=600),
            schedule=Linear(warmup_steps=60),
            validate_every=100,
            checkpoint_every=300,
        ),
        evaluation=Evaluation(splits=(), examples=1, rows=1, max_new_tokens=1, validation_batches=64),
        arms={
            "t5like": Arm(model=match_training_flops(t5like, gpt, text, multiple=8), learning_rate=4e-3),
            "gpt": Arm(model=gpt, learning_rate=4e-3),
        },
    )
