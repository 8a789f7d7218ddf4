"""The expected best of k trials against enumeration and closed forms."""

import itertools
import math

import numpy as np
import pytest

from common.analysis.effort import counts, efforts_that_reverse, expected_best, expected_of_best


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


def test_a_score_is_that_of_the_trial_with_the_lowest_loss() -> None:
    rng = np.random.default_rng(1)
    losses, scores = rng.exponential(size=7), rng.normal(size=7)
    chosen = [
        [scores[min(few, key=lambda i: losses[i])] for few in itertools.combinations(range(7), k)] for k in range(1, 8)
    ]
    assert expected_of_best(losses, scores) == pytest.approx([np.mean(few) for few in chosen], rel=1e-12)


def test_a_difference_that_depends_on_effort_is_found() -> None:
    def reversed_by(first: list[float], second: list[float]) -> tuple[int, ...]:
        return efforts_that_reverse(expected_best(first), expected_best(second))

    assert reversed_by([1.0, 1.1, 1.2], [2.0, 2.1, 2.2]) == ()
    assert reversed_by([2.0, 2.0, 2.0], [1.0, 9.0, 9.0]) == (1, 2)
    assert reversed_by([math.inf] * 3, [math.inf] * 3) == ()
    with pytest.raises(ValueError, match="2 and 3 trials"):
        efforts_that_reverse([1.0, 2.0], [1.0, 2.0, 3.0])


def reverses(first_T: np.ndarray, second_T: np.ndarray) -> bool:
    """Returns whether a reversal stands against the difference of two arms, from the losses of their trials."""
    efforts = efforts_that_reverse(expected_best(first_T), expected_best(second_T))
    return any(counts(effort, len(first_T)) for effort in efforts)


def test_the_worse_half_of_the_trials_has_no_say() -> None:
    """Whatever it is, so divergence at one end of the space neither makes nor hides a reversal."""
    rng = np.random.default_rng(0)
    for trials in (3, 5, 8, 16):
        first, second = np.sort(rng.exponential(size=(2, trials)))
        worse = trials - trials // 2
        for wild in (1e6, math.inf):
            assert reverses(np.r_[first[:worse], [wild] * (trials - worse)], second) == reverses(first, second)


def test_a_narrow_optimum_that_is_barely_ahead_depends_on_effort() -> None:
    narrow, flat = np.array([1.0, 1.5, 1.5, 1.5, 1.5]), np.array([1.05, 1.06, 1.07, 1.08, 1.09])
    assert reverses(narrow, flat) and reverses(flat, narrow) and not reverses(narrow, flat + 0.5)


def test_the_noise_of_trials_makes_few_reversals() -> None:
    """At most 3 of 100 searches reverse two arms with one optimum that differ by 3 standard deviations of the noise."""
    rng = np.random.default_rng(0)
    for trials, curvature in ((3, 0.02), (5, 0.1), (16, 0.5)):
        found = []
        for _ in range(400):
            place = rng.uniform(-2, 2, trials) if trials > 5 else np.arange(trials) - (trials - 1) / 2
            losses = 1 + curvature * (place - rng.uniform(-0.5, 0.5)) ** 2 + rng.normal(0, 0.01, (2, trials))
            found.append(reverses(losses[0], losses[1] + 0.03))
        assert np.mean(found) <= 0.03
