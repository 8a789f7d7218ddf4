"""Compares intervals with closed forms, exact coverage and simulation."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, multinomial

from common.analysis.statistics import compare_paired, holm, paired_difference, wilson


def paired(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = [both, only_first, only_second, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (3, 10), (1944, 2000)])
def test_wilson_equals_scipys(successes: int, trials: int) -> None:
    interval = wilson(successes, trials)
    expected = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


@pytest.mark.parametrize("share", [0.5, 0.9, 0.965])
def test_wilson_covers_the_true_share(share: float) -> None:
    """Computes the coverage exactly, by summing over every outcome of 200 trials."""
    outcomes = np.arange(201)
    intervals = [wilson(k, 200) for k in range(201)]
    covered = np.array([i.low <= share <= i.high for i in intervals])
    assert 0.93 < (binom.pmf(outcomes, 200, share) * covered).sum() < 0.975


def test_paired_interval_is_nearly_normal_for_many_examples() -> None:
    compared = compare_paired(*paired(3000, 300, 200, 500))
    d, dispute = 100 / 4000, 500 / 4000
    half = 1.96 * np.sqrt((dispute - d * d) / 4000)
    assert compared.difference.value == d
    assert (compared.difference.low, compared.difference.high) == pytest.approx((d - half, d + half), rel=0.03)
    assert (compared.both, compared.only_first, compared.only_second, compared.neither) == (3000, 300, 200, 500)


@pytest.mark.parametrize(("won", "lost", "examples"), [(7, 3, 40), (1, 0, 20), (0, 9, 30), (60, 30, 100)])
def test_the_score_test_rejects_beyond_the_paired_interval(won: int, lost: int, examples: int) -> None:
    """Finds the most likely share under the hypothesis by search, not by formula."""
    interval = paired_difference(won, lost, examples)
    assert interval.value == (won - lost) / examples
    for delta in (interval.low, interval.high):

        def unlikely(share: float, delta: float = delta) -> float:
            return -float(multinomial.logpmf([won, lost, examples - won - lost], examples, cells(share, delta)))

        def cells(share: float, delta: float) -> list[float]:
            return [share + delta, share, 1 - 2 * share - delta]

        bounds = (max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12)
        share = minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x
        variance = examples * (2 * share + delta - delta**2)
        assert abs(won - lost - examples * delta) / np.sqrt(variance) == pytest.approx(1.959964, rel=1e-4)


@pytest.mark.parametrize("examples", [10, 20, 50, 100, 200])
@pytest.mark.parametrize(
    ("wins", "losses"),
    [(0.0, 0.0), (0.02, 0.0), (0.05, 0.0), (0.02, 0.02), (0.3, 0.1), (0.5, 0.5), (0.9, 0.05), (0.98, 0.0)],
)
def test_paired_interval_covers_the_true_difference(examples: int, wins: float, losses: float) -> None:
    """Computes the coverage exactly, by summing over outcomes, also near 0 and 1, where a bootstrap has no width."""
    won_O, lost_O = (x.ravel() for x in np.meshgrid(np.arange(examples + 1), np.arange(examples + 1)))
    outcomes_O3 = np.stack([won_O, lost_O, examples - won_O - lost_O], axis=1)
    with np.errstate(invalid="ignore"):  # impossible outcomes have probability 0
        probability_O = multinomial.pmf(outcomes_O3, examples, [wins, losses, 1 - wins - losses])
    covered = 0.0
    for outcome in np.flatnonzero(probability_O > 1e-5).tolist():
        interval = paired_difference(int(won_O[outcome]), int(lost_O[outcome]), examples)
        covered += probability_O[outcome] * (interval.low <= wins - losses <= interval.high)
    assert covered > 0.92


def test_paired_interval_has_a_width_without_wins() -> None:
    for examples in (1, 20, 3739):
        interval = paired_difference(0, 0, examples)
        edge = 1.959964**2 / (examples + 1.959964**2)  # closed form
        assert (interval.low, interval.high) == pytest.approx((-edge, edge), rel=1e-5)
    assert paired_difference(5, 0, 5).high == 1.0 and paired_difference(5, 0, 5).low < 0.5


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(5, 1, 2 * 7 / 64), (4, 0, 2 / 16), (0, 0, 1.0), (3, 3, 1.0), (10, 0, 2 / 1024)],
)
def test_mcnemar_equals_the_exact_binomial_test(only_first: int, only_second: int, p: float) -> None:
    assert compare_paired(*paired(50, only_first, only_second, 5)).p_value == pytest.approx(p)


def test_swapping_systems_mirrors_the_interval() -> None:
    first, second = paired(500, 50, 30, 20)
    there, back = compare_paired(first, second).difference, compare_paired(second, first).difference
    assert (back.low, back.value, back.high) == pytest.approx((-there.high, -there.value, -there.low), abs=1e-12)


def test_holm_keeps_the_level_over_all_tests() -> None:
    p_RT = np.random.default_rng(0).random((2000, 6))
    alone, together = ((p < 0.05).any(axis=1).mean() for p in (p_RT, np.array([holm(p.tolist()) for p in p_RT])))
    assert together <= 0.06 < 0.2 < alone
    assert holm([]) == () and holm([0.2]) == (0.2,) and holm([0.9, 0.9]) == (1.0, 1.0)
    assert holm([0.01, 0.02]) == pytest.approx((0.02, 0.02))
