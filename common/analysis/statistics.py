"""Intervals and tests for shares and their differences.

Legend: E examples, R resamples.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from common.analysis.interval import Interval

CONFIDENCE = 0.95
"""The confidence level of every interval in the project."""
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""Half the width of such an interval around a normal mean, in standard errors."""


def wilson(successes: int, trials: int) -> Interval:
    """Returns a share of independent yes/no outcomes with its score interval (Wilson 1927, no continuity correction).

    Unlike the normal interval it always has a width: ten successes in ten trials do not prove a share of 1.

    >>> interval = wilson(10, 10)
    >>> round(interval.low, 4), interval.high
    (0.7225, 1.0)
    """
    # Not scipy.stats, because importing it takes longer than scoring a small run.
    assert 0 <= successes <= trials and trials > 0, (successes, trials)
    share, spread = successes / trials, Z**2 / trials
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    low = 0.0 if successes == 0 else (centre - half) / (1 + spread)
    high = 1.0 if successes == trials else (centre + half) / (1 + spread)
    return Interval(value=share, low=low, high=high)


def percentile_interval(value: float, resampled_R: np.ndarray) -> Interval:
    """Returns `value` with the bootstrap percentile interval of its resampled values.

    >>> percentile_interval(1.0, np.arange(0.0, 101.0))
    Interval(value=1.0, low=2.5, high=97.5)
    """
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled_R, [round(tail, 9), round(100 - tail, 9)])
    return Interval(value=float(value), low=float(low), high=float(high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """A comparison of two systems on the same examples."""

    both: int
    only_first: int
    only_second: int
    neither: int
    """These four count the examples that both systems, only one of them, or neither answered correctly."""
    difference: Interval
    """The first system's share of correct examples minus the second's, -1..1, with its score interval."""
    p_value: float
    """The p-value of McNemar's exact test: a binomial test on the examples that exactly one system got right."""

    @property
    def examples(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither


def compare_paired(first_E: np.ndarray, second_E: np.ndarray) -> PairedComparison:
    """Compares two systems on the same examples; each array, bool [E], says which a system got right.

    >>> compared = compare_paired(np.array([True] * 5 + [False]), np.array([False] * 5 + [True]))
    >>> compared.only_first, compared.only_second, round(compared.p_value, 5)
    (5, 1, 0.21875)
    """
    from scipy.stats import binomtest

    first_E, second_E = np.asarray(first_E), np.asarray(second_E)
    assert first_E.dtype == second_E.dtype == bool and first_E.shape == second_E.shape and first_E.ndim == 1
    assert len(first_E), "nothing to compare"
    won, lost = int((first_E & ~second_E).sum()), int((~first_E & second_E).sum())
    both = int((first_E & second_E).sum())
    return PairedComparison(
        both=both,
        only_first=won,
        only_second=lost,
        neither=len(first_E) - both - won - lost,
        difference=paired_difference(won, lost, len(first_E)),
        p_value=float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    )


def paired_difference(won: int, lost: int, examples: int) -> Interval:
    """Returns the difference of two shares of the same examples with its score interval.

    The interval holds all differences that a score test does not reject (Tango 1998, Statistics in Medicine 17:
    891-908). `won` and `lost` count the examples that only the first and only the second system got right. Unlike a
    bootstrap interval, it has a width even if a system never wins.

    >>> no_wins = paired_difference(0, 0, 3739)
    >>> round(no_wins.low, 5), round(no_wins.high, 5)
    (-0.00103, 0.00103)
    """
    assert min(won, lost) >= 0 and won + lost <= examples and examples > 0, (won, lost, examples)
    value = (won - lost) / examples

    def accepted(delta: float) -> bool:
        # `lost_share` is the maximum-likelihood share that only the second system gets right, if the true difference
        # is `delta`: the larger root of a x^2 + b x - lost delta (1 - delta).
        a, b = 2 * examples, (2 * examples - won + lost) * delta - won - lost
        lost_share = (np.sqrt(b * b + 4 * a * lost * delta * (1 - delta)) - b) / (2 * a)
        variance = examples * (2 * lost_share + delta * (1 - delta))
        return bool((won - lost - examples * delta) ** 2 <= Z**2 * variance)

    return Interval(value=value, low=_edge(accepted, value, -1.0), high=_edge(accepted, value, 1.0))


def _edge(accepted: Callable[[float], bool], inside: float, outside: float) -> float:
    """Bisects for the end of the accepted values from `inside`, which is accepted, towards `outside`."""
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if accepted(middle) else (inside, middle)
    return outside


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Corrects the p-values of several tests for how many tests there are (Holm 1979).

    If no test has a true effect, the chance that any corrected p-value is 0.05 or less is at most 5 %.

    >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return tuple(corrected)
