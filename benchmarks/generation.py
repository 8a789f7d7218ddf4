"""Greedy decoding beside Hugging Face's `generate`: two processes take turns, with models of equal shapes.

Weights are random and each side's own: what is compared is the work, and no end token may come early.
"""

import contextlib
import dataclasses
from collections.abc import Callable

from benchmarks.decoder import Spread
from benchmarks.side_by_side import Worker
from experiments.config import ModelConfig
from gpt.config import GptConfig
from t5like.config import SIZES

ROWS, PROMPT, NEW = 8, 128, 128
EOS = 1
MODELS: dict[str, ModelConfig] = {
    "t5-v1.1-small": SIZES["t5-v1.1-small"],
    "llama-71m": GptConfig(
        vocab_size=32000, num_layers=8, d_model=512, num_heads=8, num_kv_heads=8, head_dim=64, d_ff=2432
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    versions: tuple[str, str]
    parameters: int
    """The same on both sides."""
    ours: Spread
    """New tokens per second, reading the prompts included."""
    theirs: Spread
    ratio: float
    """Our tokens per second over theirs, of the medians."""
    paired: Spread
    """The same, round by round."""


def compare(name: str, rounds: int, advance: Callable[[int], None]) -> Generation:
    """One batch a turn. Raises RuntimeError where the two models differ in size."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(f"benchmarks.{module}", name))
            for module in ("generation_peer", "transformers_peer")
        ]
        sizes = {worker.about["parameters"] for worker in workers}
        if len(sizes) != 1:
            raise RuntimeError(f"{name} has {' and '.join(map(str, sizes))} parameters on the two sides")
        for _ in range(rounds):
            for worker, own in zip(workers, seconds, strict=True):
                own.append(worker.run(1))
            advance(1)
    ours, theirs = (Spread.of(own).over(ROWS * NEW) for own in seconds)
    return Generation(
        versions=(workers[0].about["version"], workers[1].about["version"]),
        parameters=sizes.pop(),
        ours=ours,
        theirs=theirs,
        ratio=ours.median / theirs.median,
        paired=Spread.of([b / a for a, b in zip(*seconds, strict=True)]),
    )
