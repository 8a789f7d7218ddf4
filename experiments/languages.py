"""Languages: do separate parameters for inputs and targets help more the further apart the two are?

Source    Hyung Won Chung's part of Stanford CS25 V4 (2024-04-11): an encoder-decoder has other parameters for inputs
          than for targets, which the talk expects to help where the two really differ, as two languages do.
Question  What does sharing the stack cost from English to Dutch, German and Japanese, at equal compute?
Data      `cldr_translate/en_nl`, `en_de` and `en_ja`, with a tokenizer each.
Command   twinstack run languages --jobs 2
Expected  Not run yet. If the talk is right, sharing costs most for Japanese.
"""

import dataclasses
from itertools import product

from common.data.sources.config import SourceConfig
from common.report.claims import Parity
from experiments.structure import structure
from experiments.study import Study


def languages() -> Study:
    base = structure()
    arms = {}
    for language, (parameters, name) in product(("nl", "de", "ja"), (("separate", "complete"), ("shared", "shared"))):
        before = base.arms[name]
        source = SourceConfig(name=f"tfds:cldr_translate/en_{language}", inputs="en", targets=language, group="kind")
        arms[f"{parameters}-{language}"] = dataclasses.replace(
            before,
            data=dataclasses.replace(before.data, source=source),
            labels={"parameters": parameters, "language": language},
        )
    return dataclasses.replace(
        base,
        name="languages",
        question="Do separate parameters for inputs and targets help more the further apart the two languages are?",
        expected="Not run yet.",
        arms=arms,
        seeds=3,
        factors=(),
        parity=(Parity(over=("parameters",), apart=("model.parameters",)),),
    )
