"""The expected best of k trials against enumeration and closed forms."""

import itertools
import math

import numpy as np
import pytest

from common.analysis.effort import efforts_that_reverse, expected_best


def test_expected_best_is_the_mean_over_all_subsets() -> None:
    losses = np.random.default_rng(0).exponential(size=8)
    expected = [np.mean([min(s) for s in itertools.combinations(losses, k)]) for k in range(1, 9)]
    assert expected_best(losses) == pytest.approx(expected, rel=1e-12)


def test_expected_best_is_unbiased() -> None:
    """The best of k uniform draws is 1 / (k + 1) on average, whatever the number of trials."""
    rng = np.random.default_rng(0)
    found = np.mean([expected_best(rng.random(16)) for _ in range(4000)], axis=0)
    assert found == pytest.approx([1 / (k + 1) for k in range(1, 17)], abs=0.01)


def test_order_and_divergence() -> None:
    assert expected_best([2.0, 1.0, 3.0]).tolist() == expected_best([3.0, 2.0, 1.0]).tolist()
    diverged = expected_best([1.0, math.inf])
    assert diverged[0] == math.inf and diverged[1] == 1.0
    for wrong in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="trials"):
            expected_best(wrong)


def test_a_difference_that_depends_on_effort_is_found() -> None:
    assert efforts_that_reverse([1.0, 1.1, 1.2], [2.0, 2.1, 2.2]) == ()
    assert efforts_that_reverse([2.0, 2.0, 2.0], [1.0, 9.0, 9.0]) == (1, 2)
    with pytest.raises(ValueError, match="2 and 3 trials"):
        efforts_that_reverse([1.0, 2.0], [1.0, 2.0, 3.0])
