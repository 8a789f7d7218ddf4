"""The parity certificate: do runs hold equal what their study claims, and does XLA's count confirm the ledger's?"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from common.report.checks import NAMED, Check, all_agree, by_name
from common.report.claims import Parity
from common.report.parity import check_group, groups, unclaimed
from common.report.results import ArmResult
from common.report.run_files import FinishedRun, StudyRuns
from common.report.units import fill, percent, scientific, si

LEDGER_TOLERANCE = 0.02
"""Largest relative difference between the ledger and XLA's count of FLOPs."""
GROUPS_SHOWN = 3
"""Most groups of runs whose differences a check spells out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A quantity, with one value per arm."""

    name: str
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """Checks of the compared runs, and facts of each arm's first seed; `facts[i].values` has the order of `arms`."""

    arms: tuple[str, ...]
    checks: tuple[Check, ...]
    unclaimed: tuple[str, ...]
    """Sentences on what the study does not claim to hold equal."""
    facts: tuple[Fact, ...]

    @property
    def agrees(self) -> bool | None:
        """Whether all checks agree; None if none differs but some could not be made."""
        return all_agree([check.agrees for check in self.checks])

    @property
    def headline(self) -> str:
        if self.agrees:
            return "every check agrees" if len(self.checks) > 1 else f"{self._alone}: nothing to compare"
        failed = sum(check.agrees is False for check in self.checks)
        unmade = sum(check.agrees is None for check in self.checks)
        verdict = f"{failed} of {len(self.checks)} checks DIFFER" if failed else "no check differs"
        return f"{verdict}, {unmade} could not be made" if unmade else verdict

    @property
    def _alone(self) -> str:
        return "only one arm" if len(self.arms) == 1 else "no runs of one group"


def certify(study: StudyRuns) -> Certificate:
    """Checks each parity claim of a study over its groups of compared runs, from everything that the runs recorded."""
    checks, sentences = [], []
    for claim in study.parity:
        found = groups(study, claim)
        where = "" if len(study.parity) == 1 else f", {_between(claim)}"
        by_group = {key: check_group(group, claim) for key, group in found.items()}
        checks += [dataclasses.replace(check, name=check.name + where) for check in _over_groups(by_group)]
        free = dict.fromkeys(what for group in found.values() for what in unclaimed(group, claim))
        if free:
            sentences.append(f"Not claimed to be equal {_between(claim)}: {'; '.join(list(free)[:6])}.")
    checks.append(_ledger_matches_xla(study.by_title))
    return Certificate(
        arms=tuple(run.arm for run in study.first_seed),
        checks=tuple(checks),
        unclaimed=tuple(sentences),
        facts=tuple(_facts(study.results)),
    )


def differences(first: FinishedRun, second: FinishedRun, claim: Parity) -> tuple[str, ...]:
    """Names the checks in which two runs of a group differ against a claim, or against XLA's count."""
    pair = {run.name: run for run in (first, second)}
    failed = [check for check in check_group(pair, claim) if check.agrees is False]
    counted = _ledger_matches_xla(pair)
    return tuple(f"“{check.name}”" for check in [*failed, *([counted] if counted.agrees is False else [])])


def _between(claim: Parity) -> str:
    labels = [label for label in claim.over if label != "arm"]
    return "between all arms" if "arm" in claim.over else f"between arms that differ in {' or '.join(labels)}"


def _over_groups(by_group: Mapping[str, Sequence[Check]]) -> Iterator[Check]:
    """Yields one check for each question that is asked of several groups."""
    for name in dict.fromkeys(check.name for checks in by_group.values() for check in checks):
        answers = {key: check for key, checks in by_group.items() for check in checks if check.name == name}
        yield Check(
            name=name,
            agrees=all_agree([check.agrees for check in answers.values()]),
            detail=next(iter(answers.values())).detail if len(by_group) == 1 else _detail(answers),
        )


def _detail(answers: Mapping[str, Check]) -> str:
    """Returns how many groups differ, and the first few that do; else one group for all."""
    parts = []
    for agrees, words in ((False, "DIFFER"), (None, "could not be checked")):
        found = [f"{key}: {check.detail}" for key, check in answers.items() if check.agrees is agrees]
        if found:
            more = [f"and {len(found) - GROUPS_SHOWN} more"] if len(found) > GROUPS_SHOWN else []
            parts.append(f"{len(found)} of {len(answers)} groups {words}: " + " | ".join(found[:GROUPS_SHOWN] + more))
    if parts:
        return "; ".join(parts)
    key, check = next(iter(answers.items()))
    return f"in each of {len(answers)} groups of runs; {key}: {check.detail}"


def _ledger_matches_xla(runs: Mapping[str, FinishedRun]) -> Check:
    answers: dict[str, bool | None] = {}
    lines = {}
    for title, run in runs.items():
        result = run.result
        if not result.xla_flops_per_step:
            answers[title] = None
            lines[title] = f"not counted{f' ({result.why_not_counted})' if result.why_not_counted else ''}"
            continue
        ratio = result.ledger_flops_per_step / result.xla_flops_per_step - 1
        answers[title] = abs(ratio) <= LEDGER_TOLERANCE  # False for NaN
        lines[title] = "+" * (ratio >= 0) + percent(ratio, 2)
    shown = list(runs)
    if len(runs) > NAMED:  # a long list is cut: what does not agree comes first
        shown.sort(key=lambda title: answers[title] is True)
    return Check(
        name=f"ledger = XLA within {100 * LEDGER_TOLERANCE:g} %",
        agrees=all_agree(list(answers.values())),
        detail=by_name({title: lines[title] for title in shown}),
    )


def _facts(results: Sequence[ArmResult]) -> Iterator[Fact]:
    for name, show in (
        ("chained fingerprint", lambda r: r.fingerprint),
        ("tokens seen", lambda r: f"{r.tokens:,}"),
        ("tokens with loss", lambda r: f"{r.loss_tokens:,}"),
        ("fill of input / target slots", fill),
        ("FLOPs, full attention, padded", lambda r: scientific(r.flops.full_attention, 4)),
        ("FLOPs, full attention, useful", lambda r: scientific(r.flops.useful_full_attention, 4)),
        ("FLOPs, causal half, padded", lambda r: scientific(r.flops.causal_half, 4)),
        ("FLOPs, 6ND, padded", lambda r: scientific(r.flops.six_nd, 4)),
        ("FLOPs of a step by the ledger", lambda r: scientific(r.ledger_flops_per_step, 4)),
        ("FLOPs of a step in XLA's program", _shown_xla_flops),
        ("parameters", lambda r: f"{r.parameters:,} ({si(r.parameters)})"),
    ):
        yield Fact(name=name, values=tuple(show(result) for result in results))


def _shown_xla_flops(result: ArmResult) -> str:
    return scientific(result.xla_flops_per_step, 4) if result.xla_flops_per_step else "not counted"
