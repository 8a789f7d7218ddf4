"""Lengths: do separate parameters for inputs and targets help more when targets are short?

Source    Hyung Won Chung's part of Stanford CS25 V4 (2024-04-11): encoder-decoders did well where long inputs have
          short targets, which is one explanation of their success at instruction tuning.
Question  What does sharing the stack cost when targets are a fifth, a third and half of a row, at equal compute?
Data      `tfds:pydocs` with span corruption; more noise makes targets longer, and rows have 128 slots in all.
Command   twinstack run lengths --jobs 2
Expected  Not run yet. Losses of different lengths are of different tasks: only differences at one length compare.
"""

import dataclasses
from itertools import product

from common.compute.matching import match_training_flops
from common.data.config import SentencePieceConfig
from common.data.objectives.config import SpanCorruption
from common.data.sources.config import SourceConfig
from common.report.claims import Parity
from experiments.families import GPT
from experiments.run import Evaluation
from experiments.structure import structure
from experiments.study import Study

SLOTS = {0.15: (104, 24), 0.3: (84, 44), 0.5: (64, 64)}
"""Share of noise -> input and target slots of a row, which T5's spans of 3 tokens fill."""


def lengths() -> Study:
    base = structure()
    arms = {}
    for noise, (parameters, name) in product(SLOTS, (("separate", "complete"), ("shared", "shared"))):
        before, (inputs, targets) = base.arms[name], SLOTS[noise]
        data = dataclasses.replace(
            before.data,
            source=SourceConfig(name="tfds:pydocs", inputs=None, targets=None, text="text"),
            tokenizer=SentencePieceConfig(vocab_size=1024, sentinels=64),
            objective=SpanCorruption(density=noise),
            input_length=inputs,
            target_length=targets,
        )
        usual = before.model
        sibling = GPT.sized(width=usual.d_model, layers=4, vocab_size=usual.vocab_size, recipe=usual.recipe)
        arms[f"{parameters}-{targets}"] = dataclasses.replace(
            before,
            model=match_training_flops(usual, sibling, data.length_sums, multiple=8),
            data=data,
            evaluation=Evaluation(validation_batches=32),
            labels={"parameters": parameters, "targets": targets},
        )
    return dataclasses.replace(
        base,
        name="lengths",
        question="Do separate parameters for inputs and targets help more when targets are short?",
        expected="Not run yet.",
        arms=arms,
        seeds=3,
        factors=(),
        parity=(Parity(over=("parameters",), apart=("model.parameters",)),),
    )
