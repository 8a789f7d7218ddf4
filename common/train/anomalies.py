"""Finds steps whose loss or gradient is not finite, or whose loss is a spike."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from common.errors import UserError
from common.train.config import Anomalies

Verdict = Literal["stop", "skip", "roll_back"]


class Diverged(UserError):
    """The run was stopped because a step's loss or gradient is not finite, or its loss is a spike."""


def spike_limit(losses: Sequence[float], deviations: float) -> float:
    """Returns median + deviations x 1.4826 x (median absolute deviation): a next loss above it is a spike.

    The value is a float32 number, since programs compare with it.

    >>> spike_limit([1.0, 2.0, 3.0, 4.0, 1000.0], 2.0)  # median 3, median absolute deviation 1
    5.965199947357178
    """
    median = statistics.median(losses)
    spread = statistics.median(abs(loss - median) for loss in losses)
    return float(np.float32(median + deviations * 1.4826 * spread))


def last_learnt(skipped: Sequence[int], step: int) -> int:
    """Returns the last step up to `step` whose batch was not skipped; 0 if there is none.

    >>> last_learnt((3, 6, 7), 7), last_learnt((3, 6, 7), 8), last_learnt((1, 2), 2)
    (5, 8, 0)
    """
    numbers = set(skipped)
    while step in numbers:
        step -= 1
    return step


class Judge:
    """Decides which steps are anomalies, from the losses of earlier steps alone.

    The limit of step t is known while step t-1 still runs, since it depends on the losses up to step t-2.
    """

    def __init__(self, config: Anomalies, losses: Iterable[tuple[int, float]]):
        """`losses`: (step, loss) of the last steps that were learnt from, as `recent` returned them."""
        self.config = config
        self._losses = deque(losses, maxlen=config.spike_window + 2)

    def learnt(self, step: int, loss: float) -> None:
        """Takes the loss of a step that was learnt from."""
        if self.config.on_spike != "ignore":
            self._losses.append((step, loss))

    def recent(self) -> tuple[tuple[int, float], ...]:
        """Returns the (step, loss) pairs that a checkpoint must keep."""
        return tuple(self._losses)

    def limit(self, step: int) -> float:
        """Returns the loss above which `step` is a spike, a float32 number; infinite while too few losses are known."""
        window = self.config.spike_window
        before = [loss for at, loss in self._losses if at <= step - 2][-window:]
        return spike_limit(before, self.config.spike_deviations) if len(before) == window else math.inf

    def verdict(self, loss: float, grad_norm: float, limit: float) -> Verdict | None:
        """Returns what to do about a step with these numbers; None if it is no anomaly."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self.config.on_nonfinite
        if loss > limit:
            assert self.config.on_spike != "ignore", "the limit is infinite while spikes are ignored"
            return self.config.on_spike
        return None
