"""Nothing but a fair, tuned, seeded and corrected difference is ever resolved."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from common.analysis.interval import Interval
from common.analysis.resolution import Claim, ComparedArm, Tuning, decide
from common.analysis.seeds import compare_seeds

TUNED = Tuning(space="learning_rate 1e-4..1e-2, mean validation loss", trials=8)


def tuned(name: str, **changes: Any) -> ComparedArm:
    return ComparedArm(name=name, tuning=dataclasses.replace(TUNED, **changes))


def by_effort(name: str, *expected: float) -> ComparedArm:
    return ComparedArm(name=name, tuning=TUNED, by_effort=expected)


def claim(difference: float = 1.0, seeds: int = 5, spread: float = 0.1, **changes: Any) -> Claim:
    noise = np.random.default_rng(seeds).normal(0, spread, seeds)
    compared = compare_seeds({s: difference + x for s, x in enumerate(noise)}, dict.fromkeys(range(seeds), 0.0))
    fair = Claim(
        first=ComparedArm(name="deep", tuning=TUNED), second=ComparedArm(name="wide", tuning=TUNED), compared=compared
    )
    return dataclasses.replace(fair, **changes)


@pytest.mark.parametrize("crossed", [None, Interval(value=1.0, low=0.2, high=1.8)])
def test_a_fair_difference_is_resolved(crossed: Interval | None) -> None:
    (found,) = decide([claim(crossed=crossed)])
    assert found.resolved and found.reasons == () and found.p_value < 1e-4


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (claim(seeds=1), "1 paired seed, at least 3 are needed"),
        (claim(seeds=2, spread=0), "2 paired seeds, at least 3 are needed"),
        (claim(difference=0.0), "the t interval over 5 seeds contains 0"),
        (claim(first=ComparedArm(name="deep", tuning=None)), "deep was not tuned"),
        (claim(second=tuned("wide", edges=("decay",))), "wide's best trial lies at the edge of its search in decay"),
        (claim(first=tuned("deep", trials=4)), "deep had 4 trials, wide 8"),
        (claim(first=tuned("deep", space="by hand")), "the searches differ: by hand (deep)"),
        (
            claim(crossed=Interval(value=1.0, low=-0.1, high=2.1)),
            "the interval over 5 seeds and the examples contains 0",
        ),
        (
            claim(first=by_effort("deep", 3.0, 2.0, 1.5, 1.0), second=by_effort("wide", 2.0, 1.5, 1.4, 1.3)),
            "the order of deep and wide depends on search effort: 3 of 4 trials are expected to reverse it",
        ),
        (claim(differs=["the order of source examples"]), "the arms differ in the order of source examples"),
    ],
)
def test_one_fault_is_enough(made: Claim, reason: str) -> None:
    (found,) = decide([made])
    assert not found.resolved and any(line.startswith(reason) for line in found.reasons), found.reasons


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((3.0, 2.0, 1.1, 1.0), (2.0, 1.5, 1.4, 1.3)),  # reversed with half of the trials, not with more
        ((3.0, 2.0, 1.0), ()),  # not known of one arm
        ((3.0, 2.0, 1.5, 1.0), (2.0, 1.5, 1.3)),  # of different searches, which is a reason of its own
    ],
)
def test_a_reversal_with_few_trials_is_none(first: tuple[float, ...], second: tuple[float, ...]) -> None:
    (found,) = decide([claim(first=by_effort("deep", *first), second=by_effort("wide", *second))])
    assert found.resolved


def test_many_claims_are_corrected_together() -> None:
    """A p-value of .02 is a difference alone, and none among five."""
    weak = claim(difference=0.08, seeds=12, spread=0.13)
    assert 0.01 < weak.compared.p_value < 0.05
    alone, among = decide([weak])[0], decide([weak, *[claim(difference=0.0)] * 4])[0]
    assert alone.resolved and not among.resolved
    assert among.reasons == (f"p = {5 * weak.compared.p_value:.2g} after correction for 5 comparisons",)


def test_arms_without_a_difference_are_seldom_resolved() -> None:
    """In at most 5 % of reports, of one comparison or of ten."""
    rng = np.random.default_rng(0)

    def report(claims: int) -> bool:
        made = []
        for _ in range(claims):
            compared = compare_seeds(dict(enumerate(rng.normal(size=5))), dict(enumerate(rng.normal(size=5))))
            made.append(claim(compared=compared))
        return any(found.resolved for found in decide(made))

    for claims, reports in ((1, 400), (10, 200)):
        assert sum(report(claims) for _ in range(reports)) / reports < 0.08
