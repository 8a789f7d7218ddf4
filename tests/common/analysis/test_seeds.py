"""Intervals over seeds against scipy's tests, closed forms and simulation."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from common.analysis.interval import Interval
from common.analysis.seeds import (
    POWER,
    bootstrap_t_interval,
    compare_seeds,
    crossed_interval,
    smallest_difference,
    t_interval,
)

REPEATS = 2000
"""Simulated studies; the standard error of a coverage near .95 is then .005."""


def test_a_comparison_is_scipys_paired_t_test() -> None:
    first = {seed: float(x) for seed, x in enumerate(np.random.default_rng(1).normal(1.0, 0.2, 7))}
    second = {seed: float(x) for seed, x in enumerate(np.random.default_rng(2).normal(0.8, 0.2, 7))}
    found = compare_seeds(first, second)
    expected = stats.ttest_rel(list(first.values()), list(second.values()))
    interval = expected.confidence_interval(0.95)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.difference.value == pytest.approx(np.mean(list(first.values())) - np.mean(list(second.values())))


def test_pairing_by_seed_removes_what_seeds_share() -> None:
    """A data order that is hard for both arms hides no difference between them."""
    shared = np.random.default_rng(0).normal(0, 10, 5)
    first = {seed: x + 0.1 + 0.001 * seed for seed, x in enumerate(shared)}
    second = dict(enumerate(shared))
    assert compare_seeds(first, second).difference.low > 0
    crosswise = {seed: second[(seed + 1) % 5] for seed in second}
    assert compare_seeds(first, crosswise).difference.low < 0


def test_one_seed_says_nothing_of_others() -> None:
    found = compare_seeds({3: 1.0}, {3: 0.1})
    assert found.seeds == (3,) and found.difference.value == 0.9 and found.p_value == 1 and found.smallest == math.inf
    for interval in (found.difference, found.bootstrap):
        assert (interval.low, interval.high) == (-math.inf, math.inf)


def test_seeds_that_only_one_arm_has_do_not_count() -> None:
    found = compare_seeds({0: 1.0, 1: 2.0, 5: 100.0}, {0: 0.0, 1: 1.0, 7: -100.0})
    assert found.seeds == (0, 1) and found.unpaired == (5, 7) and found.difference.value == 1
    with pytest.raises(ValueError, match="no seed in common"):
        compare_seeds({0: 1.0}, {1: 1.0})
    with pytest.raises(ValueError, match="not finite"):
        compare_seeds({0: math.nan}, {0: 1.0})


def test_equal_differences_have_no_width() -> None:
    found = compare_seeds({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 1.0, 2: 2.0})
    assert found.difference == found.bootstrap == Interval(value=1.0, low=1.0, high=1.0)
    assert found.p_value == 0 and found.smallest == 0
    same = compare_seeds({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert same.p_value == 1 and same.difference.low == same.difference.high == 0


def coverage(interval: Callable[[np.ndarray], Interval], draw: Callable[..., np.ndarray]) -> float:
    """Share of simulated studies whose interval covers the true mean, which is 0."""
    rng = np.random.default_rng(0)
    found = [interval(draw(rng)) for _ in range(REPEATS)]
    return float(np.mean([x.low <= 0 <= x.high for x in found]))


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_t_intervals_cover_normal_seeds(seeds: int) -> None:
    assert coverage(t_interval, lambda rng: rng.normal(size=seeds)) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("seeds", "least"), [(5, 0.91), (10, 0.92), (20, 0.92)])
def test_bootstrap_t_covers_skewed_seeds_better(seeds: int, least: float) -> None:
    """For exponential values, whose mean the t interval covers in 88 to 92 % of cases."""

    def skewed(rng: np.random.Generator) -> np.ndarray:
        return rng.exponential(size=seeds) - 1

    found = coverage(lambda values: bootstrap_t_interval(values, 500), skewed)
    assert found > max(least, coverage(t_interval, skewed))


def draw_crossed(rng: np.random.Generator, seeds: int, examples: int, spread: tuple[float, float, float]) -> np.ndarray:
    seed, example, rest = spread
    by_seed, by_example = rng.normal(0, seed, (seeds, 1)), rng.normal(0, example, (1, examples))
    return by_seed + by_example + rng.normal(0, rest, (seeds, examples))


@pytest.mark.parametrize(
    "spread", [(0.3, 0.0, 1.0), (0.0, 1.0, 0.3), (0.1, 1.0, 1.0)], ids=["seeds", "examples", "both"]
)
def test_crossed_intervals_cover_seeds_and_examples(spread: tuple[float, float, float]) -> None:
    """Whichever of the two varies; the interval over seeds alone covers far less where examples do."""
    assert 0.93 < coverage(crossed_interval, lambda rng: draw_crossed(rng, 5, 60, spread)) <= 1
    if spread[1]:
        alone = coverage(lambda x: t_interval(x.mean(axis=1)), lambda rng: draw_crossed(rng, 5, 60, spread))
        assert alone < 0.8


def test_a_test_set_answered_twice_is_no_larger_one() -> None:
    difference_SE = draw_crossed(np.random.default_rng(0), 5, 60, (0.1, 1.0, 0.0))
    once, twice = crossed_interval(difference_SE), crossed_interval(np.repeat(difference_SE, 2, axis=0))
    # Seeds repeated are no seeds, but examples' share of the variance stays: it does not shrink with copies of seeds.
    assert twice.high - twice.low > 0.7 * (once.high - once.low)


def test_the_crossed_variance_by_hand() -> None:
    """[[0, 2], [2, 8]]: means 1 and 5 by seed, 1 and 5 by example; rest +-1."""
    found = crossed_interval(np.array([[0.0, 2.0], [2.0, 8.0]]))
    by_seed = by_example = 2 * 8.0  # 2 values a mean, variance 8 of (1, 5)
    rest = 4 * 1.0
    variance = (by_seed + by_example - rest) / 4
    freedom = (by_seed + by_example - rest) ** 2 / (by_seed**2 + by_example**2 + rest**2)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3 - half, 3 + half))


def test_intervals_over_examples_need_several() -> None:
    with pytest.raises(ValueError, match="1 examples"):
        crossed_interval(np.ones((3, 1)))
    assert crossed_interval(np.ones((1, 9))).high == math.inf
    assert crossed_interval(np.ones((3, 9))) == Interval(value=1.0, low=1.0, high=1.0)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_smallest_difference_is_resolved_with_its_power(seeds: int) -> None:
    rng = np.random.default_rng(0)
    difference = smallest_difference(2.0, seeds)
    values_RS = rng.normal(difference, 2.0, (20_000, seeds))
    resolved = stats.ttest_1samp(values_RS, 0, axis=1).pvalue < 0.05
    assert resolved.mean() == pytest.approx(POWER, abs=0.01)
    assert smallest_difference(1.0, 1) == math.inf
