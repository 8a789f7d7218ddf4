"""Multi30k on an accelerator: as multi30k, with wider models, larger batches and many more epochs.

Question  As multi30k's, when neither family lacks training.
Data      As multi30k's.
Command   twinstack compare multi30k_accelerator    (several chips: train.mesh.data=N)
Expected  Not run yet: no accelerator was at hand. Its BLEU should be at least multi30k's.
"""

import dataclasses

from common.compute.length_sums import LengthSums
from common.compute.matching import match_training_flops
from common.recipe import Execution, Recipe
from common.train.config import Budget, Linear
from experiments.config import Arm, Experiment
from experiments.families import GPT, T5LIKE
from experiments.multi30k import multi30k
from experiments.registry import EXPERIMENTS


def multi30k_accelerator() -> Experiment:
    base = multi30k()
    recipe = Recipe(positions="rope", mlp="swiglu", init="fan_in", dropout=0.3)
    gpt = GPT.sized(width=256, layers=6, vocab_size=4096, recipe=recipe)
    t5like = T5LIKE.sized(width=256, layers=6, vocab_size=4096, recipe=recipe)
    data = dataclasses.replace(base.data, rows=64)
    text = LengthSums.of_rows(data.rows, data.input_length, data.target_length)
    return dataclasses.replace(
        base,
        name="multi30k_accelerator",
        question=EXPERIMENTS["multi30k_accelerator"],
        expected="Not run yet: no accelerator was at hand.",
        data=data,
        train=dataclasses.replace(
            base.train,
            budget=Budget(unit="steps", amount=4000),
            schedule=Linear(warmup_steps=400),
            validate_every=200,
            checkpoint_every=1000,
            execution=Execution(dtype="bfloat16", scan_layers=True),
        ),
        evaluation=dataclasses.replace(
            base.evaluation, splits=("test_2016_flickr", "test_2017_flickr", "test_2017_mscoco")
        ),
        arms={
            "t5like": Arm(model=match_training_flops(t5like, gpt, text, multiple=8), learning_rate=1e-3),
            "gpt": Arm(model=gpt, learning_rate=1e-3),
        },
    )
