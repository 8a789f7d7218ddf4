"""Assigns each example of a mixture to a component: a function of (rates, seed, number), so that any can be found.

Example n draws the point `n * golden ratio + start` on a circle, and each component owns an arc in proportion to its
rate. Every stretch of that sequence is spread evenly over the circle, so the share of a component in any run of batches
is its rate, within a few examples. How many of the first n points lie in an arc is a sum with a closed form.

The rank of an example counts the earlier examples of the same component.

Legend: E examples, M components.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from common.errors import UserError
from common.ranges import NotNegative, check_ranges

CIRCLE = 1 << 32
STRIDE = 2_654_435_769
"""The circle over the golden ratio; odd, so that every point is visited."""
BLOCK = 1 << 12
"""Consecutive examples that `find` computes together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    """Components with rates, of which only the ratios matter.

    Raises UserError if no rate is positive, or one is negative or not finite.
    """

    rates: tuple[NotNegative, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if sum(self.rates) == 0:
            raise UserError(f"rates are {list(self.rates)}: a mixture of nothing; at least one must be positive")

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (component, rank), int64 [E] each, of examples `start` to `stop - 1`.

        >>> component, rank = Mixing(rates=(2.0, 1.0)).take(0, 9)
        >>> np.bincount(component).tolist(), rank[component == 1].tolist()
        ([6, 3], [0, 1, 2])
        """
        number_E = np.arange(start, stop, dtype=np.uint64)
        point_E = (number_E * np.uint64(STRIDE) + np.uint64(self._start())) % np.uint64(CIRCLE)
        component_E = np.searchsorted(np.array(self._ends(), np.uint64), point_E, side="right")
        rank_E = np.empty(len(number_E), np.int64)
        for component, before in enumerate(self.counts(start)):
            (members,) = np.nonzero(component_E == component)
            rank_E[members] = before + np.arange(len(members))
        return component_E.astype(np.int64), rank_E

    def find(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the same as `take` for any examples in any order; fastest if their numbers are close together."""
        component_E, rank_E = np.empty(len(number_E), np.int64), np.empty(len(number_E), np.int64)
        block_E = number_E // BLOCK
        for block in np.unique(block_E).tolist():
            (members,) = np.nonzero(block_E == block)
            component, rank = self.take(block * BLOCK, (block + 1) * BLOCK)
            offsets = number_E[members] - block * BLOCK
            component_E[members], rank_E[members] = component[offsets], rank[offsets]
        return component_E, rank_E

    def counts(self, n: int) -> list[int]:
        """Returns how many of the first `n` examples each component has [M], in time logarithmic in `n`."""
        below = [_points_below(end, n, self._start()) for end in self._ends()]
        return [here - before for before, here in zip([0, *below], below, strict=False)]

    def _start(self) -> int:
        return self.seed * 0x9E37_79B9 % CIRCLE

    def _ends(self) -> list[int]:
        """Returns the end of each component's arc; the last positive rate's arc ends the circle."""
        shares = np.cumsum(self.rates) / sum(self.rates)
        return [CIRCLE if share >= 1 - 1e-12 else round(float(share) * CIRCLE) for share in shares]


def rates_by_size(sizes: Sequence[int], *, temperature: float = 1.0, cap: int | None = None) -> tuple[float, ...]:
    """Returns rates proportional to `min(size, cap) ** (1 / temperature)`, with sum 1 (arXiv 1910.10683, 3.5.2).

    At temperature 1 they are proportional to size; higher temperatures make them more equal.

    >>> rates_by_size([300, 100, 100], cap=200)
    (0.5, 0.25, 0.25)
    >>> [round(rate, 3) for rate in rates_by_size([400, 100], temperature=2.0)]
    [0.667, 0.333]
    """
    if min(sizes, default=0) < 0 or sum(sizes) == 0:
        raise UserError(f"sizes are {list(sizes)}: a mixture of nothing")
    capped = np.array([size if cap is None else min(size, cap) for size in sizes], np.float64)
    scaled = (capped / capped.max()) ** (1.0 / temperature) * (capped > 0)
    return tuple((scaled / scaled.sum()).tolist())


def _points_below(end: int, n: int, start: int) -> int:
    """Returns how many of the first `n` points lie before `end`."""
    return _floor_sum(n, STRIDE, start) - _floor_sum(n, STRIDE, start - end)


def _floor_sum(n: int, a: int, b: int, m: int = CIRCLE) -> int:
    """Returns the sum of floor((a k + b) / m) over k < n, by the steps of Euclid's algorithm."""
    total = 0
    while n:
        total += (a // m) * (n * (n - 1) // 2) + (b // m) * n
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            break
        n, b, m, a = last // m, last % m, a, m
    return total
