"""Decides whether a difference between two arms is resolved: the one place that may say so."""

import dataclasses
from collections.abc import Sequence

from common.analysis.effort import counts, efforts_that_reverse
from common.analysis.interval import Interval
from common.analysis.seeds import FEWEST_SEEDS, SeedComparison
from common.analysis.statistics import CONFIDENCE, holm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How an arm's hyperparameters were searched for."""

    space: str
    """The space and the rule of the search, such as `learning_rate 1e-4..1e-2 log-spaced, mean validation loss`."""
    trials: int
    edges: tuple[str, ...] = ()
    """The hyperparameters in which the best trial lies at the edge of the space: a better one may lie beyond."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparedArm:
    """What a claim about an arm rests on, apart from its results."""

    name: str
    tuning: Tuning | None
    """None: it was not tuned."""
    by_effort: Sequence[float] = ()
    """The measure as it is expected with the best of 1, 2, ... of the trials; empty where that is not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A difference between two arms that a report would like to state."""

    first: ComparedArm
    second: ComparedArm
    compared: SeedComparison
    crossed: Interval | None = None
    """The difference for other seeds and other examples, where it is one of scores on the same examples."""
    differs: Sequence[str] = ()
    """What the certificate found to differ between the arms against the study's claim; empty where it agrees."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolution:
    """Whether a claim is resolved, and if not, every reason why not."""

    p_value: float
    """Corrected for the number of claims that are decided together (Holm)."""
    reasons: tuple[str, ...]
    """What stands against it; empty where the difference is resolved."""

    @property
    def resolved(self) -> bool:
        return not self.reasons


def decide(claims: Sequence[Claim]) -> tuple[Resolution, ...]:
    """Decides all claims of one report together, in their order.

    A difference is resolved where at least three seeds are paired; both the t and the bootstrap-t interval over seeds
    exclude 0, and so does that over seeds and examples where there is one; the paired t test holds after Holm's
    correction for all claims; both arms were tuned by the same search with as many trials, neither's best trial lies at
    its edge, and their order is the same with any number of trials above half of them (`effort.counts`); and the
    certificate found nothing that differs against what the study claims.
    """
    corrected = holm([claim.compared.p_value for claim in claims])
    return tuple(
        Resolution(p_value=p_value, reasons=(*_spread(claim, p_value, len(claims)), *_fairness(claim)))
        for claim, p_value in zip(claims, corrected, strict=True)
    )


def _spread(claim: Claim, p_value: float, claims: int) -> list[str]:
    """Returns what the spread over seeds, and over examples, has against the difference."""
    compared, count = claim.compared, len(claim.compared.seeds)
    if count < FEWEST_SEEDS:
        return [f"{count} paired seed{'s' * (count > 1)}, at least {FEWEST_SEEDS} are needed"]
    found = [
        f"the {name} interval over {count} seeds contains 0"
        for name, interval in (("t", compared.difference), ("bootstrap-t", compared.bootstrap))
        if _contains_zero(interval)
    ]
    if claim.crossed is not None and _contains_zero(claim.crossed):
        found.append(f"the interval over {count} seeds and the examples contains 0")
    if not found and p_value >= 1 - CONFIDENCE:
        found.append(f"p = {p_value:.2g} after correction for {claims} comparisons")
    return found


def _contains_zero(interval: Interval) -> bool:
    return interval.low <= 0 <= interval.high


def _fairness(claim: Claim) -> list[str]:
    """Returns what makes the comparison unfair, whatever its numbers say."""
    found = []
    for arm in (claim.first, claim.second):
        if arm.tuning is None:
            found.append(f"{arm.name} was not tuned")
        elif arm.tuning.edges:
            edges = " and ".join(arm.tuning.edges)
            found.append(f"{arm.name}'s best trial lies at the edge of its search in {edges}, which must be extended")
    first, second = claim.first.tuning, claim.second.tuning
    if first is not None and second is not None:
        if first.space != second.space:
            found.append(
                f"the searches differ: {first.space} ({claim.first.name}), {second.space} ({claim.second.name})"
            )
        if first.trials != second.trials:
            found.append(f"{claim.first.name} had {first.trials} trials, {claim.second.name} {second.trials}")
    return [*found, *_reversed(claim), *(f"the arms differ in {what}" for what in claim.differs)]


def _reversed(claim: Claim) -> list[str]:
    """Returns at which search efforts the order of the arms would be another one, if there are any that count."""
    trials = len(claim.first.by_effort)
    if not trials or len(claim.second.by_effort) != trials:
        return []
    efforts = efforts_that_reverse(claim.first.by_effort, claim.second.by_effort)
    if not (found := [effort for effort in efforts if counts(effort, trials)]):
        return []
    names = f"{claim.first.name} and {claim.second.name}"
    listed = ", ".join(map(str, found))
    return [f"the order of {names} depends on search effort: {listed} of {trials} trials are expected to reverse it"]
