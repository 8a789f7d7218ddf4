"""How good the best of k trials is: a comparison that depends on search effort shows none.

Legend: T trials, K efforts.
"""

from collections.abc import Sequence

import numpy as np


def expected_best(losses_T: Sequence[float] | np.ndarray) -> np.ndarray:
    """Expected lowest loss of the best of k trials, for k = 1 .. T, float64 [T].

    The mean over all subsets of k of the trials (without replacement), so unbiased for the distribution that they are
    independent draws of, unlike the estimate with replacement of Dodge et al. 2019 (arXiv 1909.03004), whose bias Tang
    et al. 2020 (arXiv 2004.13705) show. Trials of a grid are no draws: there it describes this grid alone.

    Raises ValueError where there is no trial, or a loss is NaN; a diverged trial counts as infinite.

    >>> expected_best([3.0, 1.0, 2.0]).round(4)
    array([2.    , 1.3333, 1.    ])
    """
    sorted_T = np.sort(np.asarray(losses_T, np.float64))
    count = len(sorted_T)
    if not count or np.isnan(sorted_T).any():
        raise ValueError(f"{count} trials, {int(np.isnan(sorted_T).sum())} of them NaN: give at least one, and no NaN")
    best = np.empty(count)
    for k in range(1, count + 1):
        # The i-th lowest is the best of k where the other k - 1 come from the trials above it: C(T-1-i, k-1) / C(T, k).
        weight, total = k / count, 0.0
        for i in range(count - k + 1):
            total += weight * sorted_T[i]
            weight *= (count - k - i) / (count - 1 - i) if i < count - 1 else 0.0
        best[k - 1] = total
    return best


def efforts_that_reverse(first_T: Sequence[float], second_T: Sequence[float]) -> tuple[int, ...]:
    """Efforts k at which the arm with the lower best loss of all trials is expected to be the worse one.

    Both arms need as many trials. An empty answer means that the comparison does not depend on effort.

    >>> efforts_that_reverse([1.0, 5.0, 5.0, 5.0], [2.0, 2.0, 2.0, 2.0])
    (1, 2)
    """
    if len(first_T) != len(second_T):
        raise ValueError(f"{len(first_T)} and {len(second_T)} trials: compare arms with as many each")
    with np.errstate(invalid="ignore"):  # where both are infinite, neither is worse
        difference_K = expected_best(first_T) - expected_best(second_T)
    return tuple(int(k) + 1 for k in np.flatnonzero(difference_K * difference_K[-1] < 0))
