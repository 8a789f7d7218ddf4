"""Structure: all 16 combinations of the four pieces that set an encoder-decoder apart, tuned, at equal compute.

Source    Hyung Won Chung's part of Stanford CS25 V4 (2024-04-11), whose path is one of these combinations after another
          (the study `ladder`); Raffel et al. 2020, arXiv 1910.10683, table 2, compares four of them at larger scale.
Question  What does each piece of structure buy on average over the others, and do the pieces depend on each other?
Data      `cldr_translate/en_de`, as in first_light: short inputs, short targets, two languages.
Command   twinstack run structure --jobs 2
Sizes     4 + 4 layers of width 128; d_ff makes training FLOPs equal. Parameters differ: sharing removes some.
Rates     Searched for every combination alike, by validation loss of one seed; the chosen one trains with five seeds.
Seen      Merging cross-attention into self-attention costs 25 points of exact match, reading layer by layer gains 15;
          sharing and causal inputs change nothing that is resolved (2 cores, 2026-11-29; results/structure.csv).
"""

import dataclasses
from itertools import product
from typing import Any

from common.compute.matching import match_training_flops
from common.report.claims import Parity
from common.train.config import Budget, Linear
from experiments.families import GPT, T5LIKE
from experiments.first_light import first_light
from experiments.run import Evaluation
from experiments.search import Search
from experiments.study import Study

SWITCHES = {
    "cross_attention": ("separate", "merged"),
    "parameters": ("separate", "shared"),
    "memory": ("final", "layerwise"),
    "input_attention": ("bidirectional", "causal"),
}
"""Each switch of the encoder-decoder: as it is, and with that piece of structure removed."""


def structure() -> Study:
    base = first_light()
    before = base.arms["gpt"]
    sizes: dict[str, Any] = {
        "width": 128,
        "layers": 4,
        "vocab_size": before.model.vocab_size,
        "recipe": before.model.recipe,
    }
    train = dataclasses.replace(
        before.train,
        budget=Budget(unit="steps", amount=600),
        schedule=Linear(warmup_steps=60),
        validate_every=200,
        checkpoint_every=600,
    )
    arms = {}
    for values in product(*SWITCHES.values()):
        switches: dict[str, Any] = dict(zip(SWITCHES, values, strict=True))
        model = dataclasses.replace(T5LIKE.sized(**sizes), **switches)
        arms[_name(switches)] = dataclasses.replace(
            before,
            model=match_training_flops(model, GPT.sized(**sizes), before.data.length_sums, multiple=8),
            train=train,
            evaluation=Evaluation(splits=("test",), examples=500, rows=125, validation_batches=32),
            labels=switches,
        )
    return Study(
        name="structure",
        question="What does each piece of an encoder-decoder's structure buy, on average over the others?",
        expected="Sharing parameters costs little, causal inputs cost something (T5, table 2).",
        arms=arms,
        seeds=5,
        search=Search(rates=(1e-3, 2e-3, 4e-3), seeds=1, extend=2),
        factors=tuple(SWITCHES),
        parity=(Parity(apart=tuple(f"model.{switch}" for switch in SWITCHES)),),
    )


def _name(switches: dict[str, Any]) -> str:
    """Returns the removed pieces, such as `merged-shared`; `complete` where none is."""
    removed = [value for switch, value in switches.items() if value == SWITCHES[switch][1]]
    return "-".join(removed) or "complete"
