"""Compares greedy decoding with Hugging Face's `generate`: two processes take turns, with models of equal shapes.

Each side has its own random weights: only the work is compared, and end tokens are suppressed.
"""

import contextlib
import dataclasses
from collections.abc import Callable

from benchmarks.decoder import Spread
from benchmarks.side_by_side import Worker
from experiments.families import GPT, T5LIKE, ModelConfig

ROWS, PROMPT, NEW = 8, 128, 128
EOS = 1
MODELS: dict[str, ModelConfig] = {
    "t5-v1.1-small": T5LIKE.sizes["t5-v1.1-small"],
    "llama-71m": GPT.sized(width=512, layers=8, d_ff=2432, vocab_size=32000),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    versions: tuple[str, str]
    parameters: int
    """Equal on both sides."""
    ours: Spread
    """New tokens per second, including prefill."""
    theirs: Spread
    ratio: float
    """Our median tokens per second over theirs."""
    paired: Spread
    """The ratio, round by round."""


def compare(name: str, rounds: int, advance: Callable[[int], None]) -> Generation:
    """Decodes one batch per turn; raises RuntimeError if the two models have different sizes."""
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
