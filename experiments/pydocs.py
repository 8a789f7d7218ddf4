"""Pretraining on Python's own documentation: the objectives of T5 and UL2 on real text, with no download.

Question  After short pretraining by span corruption, at equal training FLOPs: which family predicts spans better?
Data      `tfds:pydocs`: the language reference, docstrings and library text of the running Python, split by module.
Command   twinstack run pydocs
          twinstack data show pydocs data.target_length=256 data.objective.kind=KIND    (KIND: see README)
Rates     From multi30k's sweep; not swept here.
Sizes     58 targets go with 256 inputs in T5's span corruption; the models train in minutes on a laptop.
"""

import dataclasses

from common.compute.matching import match_training_flops
from common.data.config import SentencePieceConfig
from common.data.objectives.config import SpanCorruption
from common.data.sources.config import SourceConfig
from common.train.config import Budget, Linear
from experiments.families import GPT, T5LIKE, ModelConfig
from experiments.multi30k import multi30k
from experiments.run import Evaluation
from experiments.study import Study


def pydocs() -> Study:
    base = multi30k()
    before = base.arms["gpt"]
    recipe = dataclasses.replace(before.model.recipe, dropout=0.0)
    gpt = GPT.sized(width=128, layers=4, vocab_size=4096, recipe=recipe)
    t5like = T5LIKE.sized(width=128, layers=4, vocab_size=4096, recipe=recipe)
    data = dataclasses.replace(
        before.data,
        source=SourceConfig(name="tfds:pydocs", inputs=None, targets=None, text="text"),
        tokenizer=SentencePieceConfig(vocab_size=4096, sentinels=100),
        objective=SpanCorruption(),
        input_length=256,
        target_length=58,
    )
    train = dataclasses.replace(
        before.train,
        budget=Budget(unit="steps", amount=600),
        schedule=Linear(warmup_steps=60),
        validate_every=100,
        checkpoint_every=300,
    )
    models: dict[str, ModelConfig] = {
        "t5like": match_training_flops(t5like, gpt, data.length_sums, multiple=8),
        "gpt": gpt,
    }
    return dataclasses.replace(
        base,
        name="pydocs",
        question="After a short pretraining on text by span corruption, at equal compute: which predicts spans better?",
        expected=(
            "Seen on 2 cores of an AMD EPYC (2026-11-23, one seed): validation loss 3.29 (t5like) and 3.55 "
            "(gpt) nats a token of the spans; 8 minutes of training with other work beside it."
        ),
        arms={
            name: dataclasses.replace(
                arm, model=models[name], data=data, train=train, evaluation=Evaluation(validation_batches=64)
            )
            for name, arm in base.arms.items()
        },
    )
