"""How sure a measured share, or a difference of two shares, is.

Legend: E examples, R resamples.
"""

import dataclasses

import numpy as np

from common.report.results import Interval

CONFIDENCE = 0.95
"""Of every interval in the project."""


def wilson(successes: int, trials: int) -> Interval:
    """A share of independent yes/no outcomes with its score interval (Wilson 1927, without continuity correction).

    Unlike the normal interval it never collapses: nothing wrong in ten trials is no proof of perfection.

    >>> interval = wilson(10, 10)
    >>> round(interval.low, 4), interval.high
    (0.7225, 1.0)
    """
    from scipy.stats import binomtest  # slow to import, and the training path imports this module

    assert 0 <= successes <= trials and trials > 0, (successes, trials)
    bounds = binomtest(int(successes), int(trials)).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Interval(value=successes / trials, low=float(bounds.low), high=float(bounds.high))


def percentile_interval(value: float, resampled_R: np.ndarray) -> Interval:
    """`value` with the bootstrap percentile interval of its resampled copies.

    >>> percentile_interval(1.0, np.arange(0.0, 101.0))
    Interval(value=1.0, low=2.5, high=97.5)
    """
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled_R, [round(tail, 9), round(100 - tail, 9)])
    return Interval(value=float(value), low=float(low), high=float(high))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedComparison:
    """Two systems' answers to the same examples."""

    both: int
    only_first: int
    only_second: int
    neither: int
    """Examples that both, one, or none of the two answered correctly."""
    difference: Interval
    """Share correct of the first less that of the second, -1..1, with its paired bootstrap interval."""
    p_value: float
    """McNemar's exact test (binomial on the examples that exactly one of the two got right)."""

    @property
    def examples(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def resolved(self) -> bool:
        """Whether the examples tell the two apart: the interval leaves out 0 and the exact test agrees.

        Both are asked because each is too sure of itself somewhere: the percentile interval with few examples in
        dispute (four against none leaves out 0, at p = 0.125), and a lone p-value hides how small the difference is.
        """
        outside = self.difference.low > 0 or self.difference.high < 0
        return outside and self.p_value < 1 - CONFIDENCE


def compare_paired(
    first_E: np.ndarray, second_E: np.ndarray, *, seed: int = 0, resamples: int = 10_000
) -> PairedComparison:
    """Compares two systems on the same examples, given which of them each got right (two bool arrays [E]).

    An example contributes -1, 0 or 1 to the difference, so that drawing E examples with replacement is one multinomial
    draw of three counts: the paired bootstrap (Efron & Tibshirani 1993, ch. 13) without an [R, E] array.

    >>> compared = compare_paired(np.array([True] * 5 + [False]), np.array([False] * 5 + [True]))
    >>> compared.only_first, compared.only_second, round(compared.p_value, 5)
    (5, 1, 0.21875)
    """
    from scipy.stats import binomtest

    first_E, second_E = np.asarray(first_E), np.asarray(second_E)
    assert first_E.dtype == second_E.dtype == bool and first_E.shape == second_E.shape and first_E.ndim == 1
    assert len(first_E), "nothing to compare"
    examples = len(first_E)
    won, lost = int((first_E & ~second_E).sum()), int((~first_E & second_E).sum())
    shares = np.array([won, lost, examples - won - lost]) / examples
    draws_R3 = np.random.default_rng(seed).multinomial(examples, shares, size=resamples)
    differences_R = (draws_R3[:, 0] - draws_R3[:, 1]) / examples
    both = int((first_E & second_E).sum())
    return PairedComparison(
        both=both,
        only_first=won,
        only_second=lost,
        neither=examples - both - won - lost,
        difference=percentile_interval((won - lost) / examples, differences_R),
        p_value=float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
    )


def verdict_line(first: str, second: str, compared: PairedComparison) -> str:
    """What the comparison shows, in one sentence that does not claim more.

    >>> same = np.array([True, False])
    >>> verdict_line("a", "b", compare_paired(same, same))
    'a − b = +0.0 points [+0.0, +0.0], n = 2, p = 1: no difference resolved'
    """
    low, value, high = (
        f"{100 * x:+.1f}".replace("-", "−")
        for x in (compared.difference.low, compared.difference.value, compared.difference.high)
    )
    p = "p < 0.0001" if compared.p_value < 1e-4 else f"p = {compared.p_value:.2g}"
    better = first if compared.difference.value > 0 else second
    verdict = f"{better} is better on these examples" if compared.resolved else "no difference resolved"
    return f"{first} − {second} = {value} points [{low}, {high}], n = {compared.examples:,}, {p}: {verdict}"
