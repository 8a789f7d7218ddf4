"""What both sides of the comparison with PyTorch share, free of either: the decoder, and how a worker takes turns."""

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
from gpt.config import GptConfig

DECODER = GptConfig(
    vocab_size=8192,
    num_layers=4,
    d_model=128,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    d_ff=352,
    recipe=Recipe(positions="rope", mlp="swiglu", init="fan_in"),
)
ROWS, LENGTH = 16, 256
OPTIMIZER = AdamW()
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """
        >>> Spread.of([3.0, 1.0, 2.0])
        Spread(median=2.0, low=1.0, high=3.0)
        """
        return cls(median=float(np.median(values)), low=min(values), high=max(values))

    def over(self, amount: float) -> "Spread":
        """Rates, from seconds: `amount` a second."""
        return Spread(median=amount / self.median, low=amount / self.high, high=amount / self.low)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(run: Callable[[int], object], about: dict[str, Any]) -> None:
    """A worker's side: says what it is, then runs as many steps as each line asks for and answers with the seconds."""
    print(json.dumps(about), flush=True)
    idle_from = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - idle_from
        begun = time.perf_counter()
        run(int(line))
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "idle_cpu_seconds": idle}), flush=True)
        idle_from = time.process_time()
