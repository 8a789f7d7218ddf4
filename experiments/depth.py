"""Depth: does reading only the last encoder layer become a bottleneck in deep models?

Source    Hyung Won Chung's part of Stanford CS25 V4 (2024-04-11): the decoder of an encoder-decoder reads the encoder's
          last layer only, which the talk expects to matter at great depth.
Question  What does reading the encoder layer by layer change at 2, 4 and 8 layers, at equal compute?
Data      `cldr_translate/en_de`, as in first_light.
Command   twinstack run depth --jobs 2
Sizes     Width 64; at each depth d_ff makes training FLOPs equal to the decoder-only model's.
Expected  Not run yet. If the talk is right, layer by layer gains with depth.
"""

import dataclasses
from itertools import product
from typing import Any

from common.compute.matching import match_training_flops
from common.report.claims import Parity
from experiments.families import GPT, T5LIKE
from experiments.structure import structure
from experiments.study import Study


def depth() -> Study:
    base = structure()
    before = base.arms["complete"]
    arms = {}
    for layers, memory in product((2, 4, 8), ("final", "layerwise")):
        usual = before.model
        sizes: dict[str, Any] = {"width": 64, "layers": layers, "vocab_size": usual.vocab_size, "recipe": usual.recipe}
        switch: dict[str, Any] = {"memory": memory}
        own = dataclasses.replace(T5LIKE.sized(**sizes), **switch)
        arms[f"{memory}-{layers}"] = dataclasses.replace(
            before,
            model=match_training_flops(own, GPT.sized(**sizes), before.data.length_sums, multiple=8),
            labels={"memory": memory, "layers": layers},
        )
    return dataclasses.replace(
        base,
        name="depth",
        question="Does reading only the last encoder layer become a bottleneck in deep models?",
        expected="Not run yet.",
        arms=arms,
        seeds=3,
        factors=(),
        parity=(Parity(over=("memory",), apart=("model.memory",)),),
    )
