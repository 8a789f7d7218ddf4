"""Seconds that a run has spent, by what it spent them on."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Literal

from common.train.checkpoints import Progress

WARM_UP = 2
"""Steps after a start that do not count towards speed: caches are cold, buffers and pages are new."""

Aside = Literal["checkpoint", "eval"]


class Clock:
    """Seconds since step 0 over all launches: training, waiting for data within it, checkpoints and validation.

    A step ends when its metrics have arrived on the host, which waits for the device, so its time is never just the
    time to dispatch it. Waiting for data counts whether the device was busy meanwhile or not. Compilation counts
    nowhere, and neither do steps that were lost when a launch ended.
    """

    def __init__(self, progress: Progress):
        self.train_seconds, self.data_seconds = progress.train_seconds, progress.data_seconds
        self._aside: dict[Aside, float] = {"checkpoint": progress.checkpoint_seconds, "eval": progress.eval_seconds}
        self.restart()

    @property
    def checkpoint_seconds(self) -> float:
        """Time for which saving held up training."""
        return self._aside["checkpoint"]

    @property
    def eval_seconds(self) -> float:
        return self._aside["eval"]

    def restart(self) -> None:
        """Begins a step now; the time since the last lap counts nowhere."""
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Ends a step, begins the next one, and returns the seconds that the step took."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.train_seconds += seconds
        return seconds

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time inside as waiting for data, which is part of the current step."""
        began = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - began

    @contextlib.contextmanager
    def aside(self, what: Aside) -> Iterator[None]:
        """Counts the time inside as `what`, and not as part of the current step."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._aside[what] += seconds
        self._last += seconds

    def stamp(self, progress: Progress) -> Progress:
        """Returns `progress` with the seconds so far."""
        return dataclasses.replace(
            progress,
            train_seconds=self.train_seconds,
            data_seconds=self.data_seconds,
            checkpoint_seconds=self.checkpoint_seconds,
            eval_seconds=self.eval_seconds,
        )


def shares(timing: dict[str, Any]) -> dict[str, float]:
    """Splits the time of a run so far, given a row of `timings.jsonl`, into shares that sum to 1.

    >>> shares({"seconds": 80.0, "data_seconds": 10.0, "checkpoint_seconds": 5.0, "eval_seconds": 15.0})
    {'data': 0.1, 'compute': 0.7, 'checkpoint': 0.05, 'eval': 0.15}
    """
    parts = {
        "data": timing["data_seconds"],
        "compute": timing["seconds"] - timing["data_seconds"],
        "checkpoint": timing["checkpoint_seconds"],
        "eval": timing["eval_seconds"],
    }
    total = sum(parts.values()) or 1.0
    return {name: seconds / total for name, seconds in parts.items()}
