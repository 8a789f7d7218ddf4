"""Does a group of runs hold equal what its study claims: data, steps, training FLOPs, recipe?

A group maps the name that a run is shown under to the run; its first run is the one that others are compared with.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from common.report.checks import Check, by_name
from common.report.claims import Parity
from common.report.one_recipe import one_recipe
from common.report.run_files import FinishedRun, StudyRuns
from common.report.units import percent, scientific

Group = Mapping[str, FinishedRun]
DATA_IDENTITIES = {"content_id": "same dataset version", "tokenizer_hash": "same tokenizer"}
"""Entries of environment.json that must be equal, with the name of the check."""
FREE_FIELDS = {
    "any": ("data",),
    "source": ("data.objective", "data.input_length", "data.target_length", "data.joint"),
}
"""Config fields that a claim about the data leaves free."""


def groups(study: StudyRuns, claim: Parity) -> dict[str, Group]:
    """Returns the groups of a claim that have at least two runs, by what the runs of a group share, such as `seed 0`.

    Runs of one group are equal in every label but those that the claim is over; the seed is always among the equal
    ones, the learning rate never.
    """
    found: dict[tuple[tuple[str, Any], ...], dict[str, FinishedRun]] = {}
    for title, run in study.by_title.items():
        skipped = {*claim.over, "arm", "seed", "learning_rate"}
        shared = {} if "arm" in claim.over else {k: v for k, v in run.listed.labels.items() if k not in skipped}
        found.setdefault((*sorted(shared.items()), ("seed", run.seed)), {})[title] = run
    return {", ".join(f"{k} {v}" for k, v in key): group for key, group in found.items() if len(group) > 1}


def check_group(group: Group, claim: Parity) -> list[Check]:
    """Checks every part of a claim; parts that are not claimed, or that no run recorded, have no check."""
    checks = [_same_data(group, claim)] if claim.data != "any" else []
    checks += _same_identities(group, claim)
    checks += [_same_counts(group, claim)] if claim.steps else []
    checks += [_same_flops(group, claim.flops_within)] if claim.flops_within is not None else []
    tuned = [path for run in group.values() for path in run.listed.tried]
    checks.append(one_recipe({title: run.config for title, run in group.items()}, (*_apart(claim), *tuned)))
    return checks


def unclaimed(group: Group, claim: Parity) -> Iterator[str]:
    """Yields what a claim does not hold equal and how far it differs in a group; what is equal anyway is not named."""
    steps = [run.result.steps for run in group.values()]
    flops = [run.result.flops.full_attention for run in group.values()]
    if claim.data == "any" and len({run.result.fingerprint for run in group.values()}) > 1:
        yield "the data"
    if claim.data == "source" and len({run.result.fingerprint for run in group.values()}) > 1:
        yield "what the objective makes of the data"
    if not claim.steps and len(set(steps)) > 1:
        yield f"steps ({min(steps):,} to {max(steps):,})"
    if claim.flops_within is None and len(set(flops)) > 1:
        yield f"training FLOPs ({scientific(min(flops))} to {scientific(max(flops))})"


def _apart(claim: Parity) -> tuple[str, ...]:
    budget = () if claim.steps else ("train.budget",)
    return (*claim.apart, *FREE_FIELDS.get(claim.data, ()), *budget)


def first_difference(fingerprints: Mapping[str, Mapping[int, str]]) -> int | None:
    """Returns the first step whose fingerprint differs between runs or is missing in one; None if there is none.

    >>> first_difference({"a": {1: "x", 2: "y"}, "b": {1: "x", 2: "z"}})
    2
    """
    runs = list(fingerprints.values())
    for step in sorted(set().union(*runs)):
        if len({run.get(step) for run in runs}) > 1:
            return step
    return None


def _same_data(group: Group, claim: Parity) -> Check:
    if claim.data == "source":
        return _same_source(group, equally_long=claim.steps)
    name = "same data in the same order" if claim.data == "batches" else "shorter runs read the first batches of longer"
    steps = {title: {row.step: row.fingerprint for row in run.metrics} for title, run in group.items()}
    for title, run in group.items():
        if (recorded := steps[title]) and recorded[max(recorded)] != run.result.fingerprint:
            detail = f"{title}: the last fingerprint in its metrics is not the one in its result: mixed files"
            return Check(name=name, agrees=False, detail=detail)
    last = {run.result.fingerprint for run in group.values()}
    if claim.data == "prefix" and len(last) > 1:
        if lacking := [title for title, recorded in steps.items() if not recorded]:
            return Check(name=name, agrees=None, detail=f"{lacking[0]} recorded no steps")
        return _compared(name, _common_steps(steps), f"the first {_fewest(group):,} batches are the same")
    first = next(iter(group.values())).result
    detail = f"{first.steps:,} batches, chained fingerprint {first.fingerprint}"
    return _compared(name, steps, detail, differs=len(last) > 1)


def _same_source(group: Group, equally_long: bool) -> Check:
    name = "same source examples in the same order"
    chains = {
        title: {row.step: row.source_fingerprint for row in run.metrics if row.source_fingerprint is not None}
        for title, run in group.items()
    }
    if lacking := [title for title, chain in chains.items() if not chain]:
        detail = f"could not be checked: {', '.join(lacking[:3])} recorded no fingerprints of source examples"
        return Check(name=name, agrees=None, detail=detail)
    detail = f"the source examples of the first {_fewest(group):,} batches are the same"
    return _compared(name, chains if equally_long else _common_steps(chains), detail)


def _fewest(group: Group) -> int:
    return min(run.result.steps for run in group.values())


def _common_steps(chains: Mapping[str, Mapping[int, str]]) -> dict[str, dict[int, str]]:
    """Returns chains up to the last step of the shortest one."""
    end = min(max(chain) for chain in chains.values())
    return {name: {step: value for step, value in chain.items() if step <= end} for name, chain in chains.items()}


def _compared(name: str, chains: Mapping[str, Mapping[int, str]], detail: str, differs: bool = False) -> Check:
    """Compares chained fingerprints; `differs`: they are known to, whatever the recorded steps say."""
    step = first_difference(chains)
    if step is None and not differs:
        return Check(name=name, agrees=True, detail=detail)
    if step is None:
        found = "the chained fingerprints differ"
    elif step == min(min(chain, default=step) for chain in chains.values()):
        found = f"the arms differ from their first step ({step}): other order, tokenizer, dataset version or objective"
    else:
        found = f"the arms agree up to step {step - 1} and differ from step {step}: other examples or another order"
    return Check(name=name, agrees=False, detail=found)


def _same_identities(group: Group, claim: Parity) -> Iterator[Check]:
    for key, name in DATA_IDENTITIES.items():
        values = {title: run.environment.get(key) for title, run in group.items()}
        if claim.data != "any" and any(value is not None for value in values.values()):
            agrees = len(set(map(str, values.values()))) == 1
            detail = str(next(iter(values.values()))) if agrees else by_name(values)
            yield Check(name=name, agrees=agrees, detail=detail)


def _same_counts(group: Group, claim: Parity) -> Check:
    """Checks the number of steps and, where the batches are claimed equal, of what they hold."""
    shows: Sequence[tuple[str, Callable[[FinishedRun], int]]] = (
        ("{:,} steps", lambda run: run.result.steps),
        ("{:,} examples", lambda run: run.result.examples),
        ("{:,} tokens", lambda run: run.result.tokens),
        ("{:,} with loss", lambda run: run.result.loss_tokens),
    )
    is_of_batches = claim.data in ("batches", "prefix")
    kept = shows if is_of_batches else shows[:1]
    lines = {title: ", ".join(text.format(get(run)) for text, get in kept) for title, run in group.items()}
    agrees = len(set(lines.values())) == 1
    name = "same steps, examples and tokens" if is_of_batches else "same steps"
    return Check(name=name, agrees=agrees, detail=next(iter(lines.values())) if agrees else by_name(lines))


def _same_flops(group: Group, within: float) -> Check:
    flops = [run.result.flops.full_attention for run in group.values()]
    spread = max(flops) / min(flops) - 1 if min(flops) > 0 else math.inf
    counts = by_name({title: scientific(run.result.flops.full_attention, 4) for title, run in group.items()})
    return Check(
        name=f"training FLOPs within {100 * within:g} %",
        agrees=spread <= within,
        detail=f"{percent(spread, 2)} apart (full attention, padding included): {counts}",
    )
