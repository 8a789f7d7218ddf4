"""Multi30k on an accelerator: as multi30k, with wider models, larger batches and many more epochs.

Question  As multi30k's, when neither family lacks training.
Data      As multi30k's.
Command   twinstack run multi30k_accelerator    (several chips: train.mesh.data=N)
Expected  Not run yet: no accelerator was at hand. Its BLEU should be at least multi30k's.
"""

import dataclasses

from common.compute.matching import match_training_flops
from common.recipe import Execution, Recipe
from common.train.config import Budget, Linear
from experiments.families import GPT, T5LIKE, ModelConfig
from experiments.multi30k import multi30k
from experiments.study import Study


def multi30k_accelerator() -> Study:
    base = multi30k()
    recipe = Recipe(positions="rope", mlp="swiglu", init="fan_in", dropout=0.3)
    gpt = GPT.sized(width=256, layers=6, vocab_size=4096, recipe=recipe)
    t5like = T5LIKE.sized(width=256, layers=6, vocab_size=4096, recipe=recipe)
    before = base.arms["gpt"]
    data = dataclasses.replace(before.data, rows=64)
    train = dataclasses.replace(
        before.train,
        budget=Budget(unit="steps", amount=4000),
        schedule=Linear(warmup_steps=400),
        validate_every=200,
        checkpoint_every=1000,
        execution=Execution(dtype="bfloat16", scan_layers=True),
    )
    evaluation = dataclasses.replace(
        before.evaluation, splits=("test_2016_flickr", "test_2017_flickr", "test_2017_mscoco")
    )
    models: dict[str, ModelConfig] = {
        "t5like": match_training_flops(t5like, gpt, data.length_sums, multiple=8),
        "gpt": gpt,
    }
    return dataclasses.replace(
        base,
        name="multi30k_accelerator",
        question="The same with wider models and many more epochs, where neither is short of training.",
        expected="Not run yet: no accelerator was at hand.",
        arms={
            name: dataclasses.replace(
                arm, model=models[name], learning_rate=1e-3, data=data, train=train, evaluation=evaluation
            )
            for name, arm in base.arms.items()
        },
    )
