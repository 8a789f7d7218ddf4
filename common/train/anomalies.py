"""Losses that are not finite or that leap."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from common.train.config import Anomalies

Verdict = Literal["stop", "skip", "roll_back"]


def spike_limit(losses: Sequence[float], deviations: float) -> float:
    """The loss above which the next one is a spike: median + deviations x 1.4826 x (median absolute deviation).

    A float32 number, since programs compare it.

    >>> spike_limit([1.0, 2.0, 3.0, 4.0, 1000.0], 2.0)  # median 3, median absolute deviation 1
    5.965199947357178
    """
    median = statistics.median(losses)
    spread = statistics.median(abs(loss - median) for loss in losses)
    return float(np.float32(median + deviations * 1.4826 * spread))


def last_learnt(skipped: Sequence[int], step: int) -> int:
    """The last step up to `step` whose batch was not skipped; 0: none.

    >>> last_learnt((3, 6, 7), 7), last_learnt((3, 6, 7), 8), last_learnt((1, 2), 2)
    (5, 8, 0)
    """
    left_out = set(skipped)
    while step in left_out:
        step -= 1
    return step


class Judge:
    """Says which step is an anomaly. What it says depends on the losses of earlier steps alone.

    The limit of step t is known while step t-1 still runs: it is made of the losses up to step t-2.
    """

    def __init__(self, config: Anomalies, losses: Iterable[tuple[int, float]]):
        """`losses`: (step, loss) of the last steps that were learnt from, as `recent` gave them."""
        self.config = config
        self._losses = deque(losses, maxlen=config.spike_window + 2)

    def learnt(self, step: int, loss: float) -> None:
        if self.config.on_spike != "ignore":
            self._losses.append((step, loss))

    def recent(self) -> tuple[tuple[int, float], ...]:
        """What a checkpoint has to keep."""
        return tuple(self._losses)

    def limit(self, step: int) -> float:
        """The loss above which `step` is a spike, float32; infinite where too few losses are known."""
        window = self.config.spike_window
        before = [loss for at, loss in self._losses if at <= step - 2][-window:]
        return spike_limit(before, self.config.spike_deviations) if len(before) == window else math.inf

    def verdict(self, loss: float, grad_norm: float, limit: float) -> Verdict | None:
        """What is to be done about a step with these numbers; None: nothing."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self.config.on_nonfinite
        if loss > limit:
            assert self.config.on_spike != "ignore", "then no loss is known and the limit is infinite"
            return self.config.on_spike
        return None
