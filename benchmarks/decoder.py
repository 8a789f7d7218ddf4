"""What both sides of the comparison with PyTorch share: the decoder's config, and the protocol of a worker.

Imports neither JAX nor PyTorch.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.recipe import Recipe
from common.train.config import AdamW
from gpt.config import sized

DECODER = sized(
    width=128, layers=4, d_ff=352, vocab_size=8192, recipe=Recipe(positions="rope", mlp="swiglu", init="fan_in")
)
ROWS, LENGTH = 16, 256
OPTIMIZER = AdamW()
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values.

        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        return cls(median=float(np.median(values)), low=min(values), high=max(values))

    def over(self, amount: float) -> "Spread":
        """Converts seconds into rates: `amount` per second."""
        return Spread(median=amount / self.median, low=amount / self.high, high=amount / self.low)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(run: Callable[[int], object], about: dict[str, Any]) -> None:
    """Runs a worker: prints `about` as JSON, then runs as many steps as each line of stdin says and prints seconds."""
    print(json.dumps(about), flush=True)
    idle_from = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - idle_from
        begun = time.perf_counter()
        run(int(line))
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "idle_cpu_seconds": idle}), flush=True)
        idle_from = time.process_time()
