"""Compares `gpt` with PyTorch: two processes take turns at training steps, so that neither slows the other."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.decoder import LENGTH, ROWS, Spread

SAME_LOSS = 1e-4
"""Largest difference in nats per token, before and after a step; more would mean that the two do different work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """Measurements of one of the two processes."""

    version: str
    step_seconds: Spread
    tokens_per_second: Spread
    losses: tuple[float, float]
    """Before and after the first step."""
    idle_cpu_seconds: float
    """CPU time used during the other process's turns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideBySide:
    gpt: Side
    torch: Side
    ratio: float
    """Our median tokens per second over PyTorch's."""
    paired: Spread
    """The ratio, round by round."""
    gflop_per_step: float


def compare(rounds: int, steps: int, mode: str, advance: Callable[[int], None]) -> SideBySide:
    """Trains `steps` steps per turn; `mode` of PyTorch is eager or compiled. Raises RuntimeError if losses differ."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with contextlib.ExitStack() as stack:
        weights = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights.npz"
        gpt = stack.enter_context(Worker("benchmarks.gpt_peer", str(weights)))  # writes what the other reads
        torch = stack.enter_context(Worker("benchmarks.torch_peer", str(weights), mode))
        for ours, theirs in zip(gpt.about["losses"], torch.about["losses"], strict=True):
            if abs(ours - theirs) > SAME_LOSS:
                raise RuntimeError(f"the losses differ: {gpt.about['losses']} and {torch.about['losses']}")
        for _ in range(rounds):
            for worker, own in zip((gpt, torch), seconds, strict=True):
                own.append(worker.run(steps) / steps)
            advance(1)
    sides = [
        Side(
            version=worker.about["version"],
            step_seconds=Spread.of(own),
            tokens_per_second=Spread.of(own).over(ROWS * LENGTH),
            losses=tuple(worker.about["losses"]),
            idle_cpu_seconds=worker.idle_cpu_seconds,
        )
        for worker, own in zip((gpt, torch), seconds, strict=True)
    ]
    return SideBySide(
        gpt=sides[0],
        torch=sides[1],
        ratio=sides[1].step_seconds.median / sides[0].step_seconds.median,
        paired=Spread.of([theirs / ours for ours, theirs in zip(*seconds, strict=True)]),
        gflop_per_step=gpt.about["flops_per_step"] / 1e9,
    )


class Worker:
    """A child process that waits for its turn (see `decoder.serve`); a context manager."""

    def __init__(self, module: str, *arguments: str):
        self.module = module
        self.idle_cpu_seconds = 0.0
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

    def __enter__(self) -> "Worker":
        self.about = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def run(self, steps: int) -> float:
        """Runs `steps` steps and returns the seconds that they took."""
        assert self._process.stdin is not None
        print(steps, file=self._process.stdin, flush=True)
        answer = self._answer()
        self.idle_cpu_seconds += answer["idle_cpu_seconds"]
        return answer["seconds"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.module} exited with status {self._process.wait()}")
        return json.loads(line)
