"""Intervals against closed forms, exact coverage and simulation."""

import numpy as np
import pytest
from scipy.stats import binom

from common.analysis.statistics import compare_paired, verdict_line, wilson


def paired(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = [both, only_first, only_second, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (3, 10), (1944, 2000)])
def test_wilson_is_the_closed_form(successes: int, trials: int) -> None:
    z, p = 1.959963984540054, successes / trials
    middle = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(p * (1 - p) / trials + z * z / (4 * trials**2))
    interval = wilson(successes, trials)
    assert (interval.value, interval.low, interval.high) == pytest.approx((p, middle - half, middle + half), abs=1e-9)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


@pytest.mark.parametrize("share", [0.5, 0.9, 0.965])
def test_wilson_covers_the_true_share(share: float) -> None:
    """Exactly, by summing over every outcome of 200 trials."""
    outcomes = np.arange(201)
    intervals = [wilson(k, 200) for k in range(201)]
    covered = np.array([i.low <= share <= i.high for i in intervals])
    assert 0.93 < (binom.pmf(outcomes, 200, share) * covered).sum() < 0.975


def test_paired_interval_is_the_normal_one_for_many_examples() -> None:
    compared = compare_paired(*paired(3000, 300, 200, 500))
    d, dispute = 100 / 4000, 500 / 4000
    half = 1.96 * np.sqrt((dispute - d * d) / 4000)
    assert compared.difference.value == d
    assert (compared.difference.low, compared.difference.high) == pytest.approx((d - half, d + half), rel=0.03)
    assert (compared.both, compared.only_first, compared.only_second, compared.neither) == (3000, 300, 200, 500)


def test_paired_interval_equals_resampling_whole_examples() -> None:
    first, second = paired(60, 20, 10, 10)
    draws = np.random.default_rng(1).integers(100, size=(20_000, 100))
    differences = first[draws].mean(axis=1) - second[draws].mean(axis=1)
    compared = compare_paired(first, second)
    assert [compared.difference.low, compared.difference.high] == pytest.approx(
        np.percentile(differences, [2.5, 97.5]),
        abs=0.0101,  # one example of the grid of differences
    )


def test_paired_interval_covers_the_true_difference_where_the_answers_are_correlated() -> None:
    generator, covered, resolved = np.random.default_rng(7), 0, 0
    for seed in range(400):
        hard = generator.random(300)
        first, second = hard < 0.88, (hard + 0.1 * (generator.random(300) - 0.5)) < 0.88  # equal shares, shared noise
        compared = compare_paired(first, second, seed=seed, resamples=1000)
        covered += compared.difference.low <= 0 <= compared.difference.high
        resolved += compared.resolved
    assert 0.92 <= covered / 400 <= 0.98
    assert resolved / 400 <= 0.05


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(5, 1, 2 * 7 / 64), (4, 0, 2 / 16), (0, 0, 1.0), (3, 3, 1.0), (10, 0, 2 / 1024)],
)
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int, p: float) -> None:
    assert compare_paired(*paired(50, only_first, only_second, 5)).p_value == pytest.approx(p)


@pytest.mark.parametrize(
    ("counts", "ending"),
    [
        ((900, 60, 20, 20), "a is better on these examples"),
        ((900, 20, 60, 20), "b is better on these examples"),
        ((900, 40, 40, 20), "no difference resolved"),
        ((1000, 0, 0, 0), "no difference resolved"),
        ((90, 4, 0, 6), "no difference resolved"),  # the bootstrap alone would call this a difference
    ],
)
def test_verdict_claims_no_more_than_the_examples_show(counts: tuple[int, ...], ending: str) -> None:
    line = verdict_line("a", "b", compare_paired(*paired(*counts)))
    assert line.endswith(ending) and f"n = {sum(counts):,}" in line


def test_same_seed_same_interval_and_swapped_systems_mirror() -> None:
    first, second = paired(500, 50, 30, 20)
    assert compare_paired(first, second, seed=3) == compare_paired(first, second, seed=3)
    there, back = compare_paired(first, second).difference, compare_paired(second, first).difference
    assert back.value == -there.value
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=0.002)
