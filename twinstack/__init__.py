"""The one public door, for notebooks and study files.

    import twinstack

    policy = twinstack.load("runs/first_light/gpt")
    texts = policy.generate(["Monday, March 4, 2024", "5 apples"], max_new_tokens=32)
    sample = twinstack.Sample(temperature=0.7)
    drawn = policy.generate(["5 apples"], sample, samples=3, seed=1, max_new_tokens=32)
    pairs = [("Monday, March 4, 2024", "Montag, 4. März 2024"), ("5 apples", "5 Äpfel")]
    for score in policy.score(pairs):
        print(score.log_likelihood, score.tokens, score.nats_per_token)
    loss = policy.loss(pairs)

`load` takes an arm's run directory, or a model folder that `twinstack convert` made. Nothing else is imported before a
name is used, and names that only describe (a study's configs) never import JAX.
"""

# ruff: noqa: F401 (the imports are for editors and type checkers)

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.compute.length_sums import LengthSums
    from common.compute.matching import match_training_flops
    from common.data.config import BytePairConfig, DataConfig, SentencePieceConfig
    from common.data.objectives.config import (
        UL2,
        UL2R,
        BertStyle,
        CausalLM,
        Deshuffling,
        FullLM,
        IidDenoising,
        Mixture,
        MixturePart,
        PrefixLM,
        SpanCorruption,
        Supervised,
    )
    from common.data.sources.config import ByRate, BySize, SourceConfig, SourceMixture, Stage, Template
    from common.errors import UserError
    from common.infer.config import Beam, Greedy, Sample
    from common.infer.policy import Policy
    from common.infer.score import Score
    from common.recipe import GPT2, LLAMA, T5_V1_0, T5_V1_1, CompleteP, Execution, Recipe, Standard
    from common.report.claims import Parity
    from common.sharding.shape import MeshShape
    from common.train.config import (
        WSD,
        Adafactor,
        AdamW,
        Anomalies,
        Budget,
        Constant,
        Cosine,
        Fresh,
        InitFrom,
        InverseSqrt,
        Linear,
        Rename,
        Resize,
        TrainConfig,
    )
    from experiments.families import GPT, T5LIKE
    from experiments.models.loading import load
    from experiments.run import After, Evaluation, MultiTurn, Run
    from experiments.running.in_python import results, run
    from experiments.search import LogRange, Search, Values
    from experiments.study import Study

MODULES = {
    "common.compute.length_sums": "LengthSums",
    "common.compute.matching": "match_training_flops",
    "common.data.config": "BytePairConfig DataConfig SentencePieceConfig",
    "common.data.objectives.config": (
        "UL2 UL2R BertStyle CausalLM Deshuffling FullLM IidDenoising Mixture MixturePart PrefixLM SpanCorruption "
        "Supervised"
    ),
    "common.data.sources.config": "ByRate BySize SourceConfig SourceMixture Stage Template",
    "common.errors": "UserError",
    "common.infer.config": "Beam Greedy Sample",
    "common.infer.policy": "Policy",
    "common.infer.score": "Score",
    "common.report.claims": "Parity",
    "common.recipe": "GPT2 LLAMA T5_V1_0 T5_V1_1 CompleteP Execution Recipe Standard",
    "common.sharding.shape": "MeshShape",
    "common.train.config": (
        "WSD Adafactor AdamW Anomalies Budget Constant Cosine Fresh InitFrom InverseSqrt Linear Rename Resize "
        "TrainConfig"
    ),
    "experiments.families": "GPT T5LIKE",
    "experiments.models.loading": "load",
    "experiments.run": "After Evaluation MultiTurn Run",
    "experiments.running.in_python": "results run",
    "experiments.search": "LogRange Search Values",
    "experiments.study": "Study",
}
"""The modules that define the public names, with those names."""

_MODULE_OF = {name: module for module, names in MODULES.items() for name in names.split()}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Imports the module of a public name when the name is first used."""
    if name not in _MODULE_OF:
        # With name and object, Python adds the closest name to its message.
        raise AttributeError(f"module 'twinstack' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    found = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
