"""The parity certificate: were the arms of a comparison given the same, and does the ledger count what runs?"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from common.compute.ledger import FLOPS_TOLERANCE
from common.report.results import ArmResult
from common.report.run_files import Run
from common.report.units import fill, percent, scientific, si
from common.train.config import only_how

LEDGER_TOLERANCE = 0.02
"""Between the ledger and XLA's count, relative."""

OWN_FIELDS = frozenset(
    {"d_ff", "d_model", "head_dim", "num_heads", "num_kv_heads", "num_layers"}
    | {"encoder_layers", "decoder_layers", "learning_rate"}
)
"""Config fields that arms may have to themselves: sizes, by which compute is matched, and the tuned learning rate."""
IDENTITY_FIELDS = frozenset({"arm", "about", "model.kind"})
DATA_IDENTITIES = {"content_id": "same dataset version", "tokenizer_hash": "same tokenizer"}
"""Entries of environment.json that must agree, with the name of the check."""


class _Absent:
    """Stands for a field that an arm's config lacks; equal to no value that a config can hold."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One question, its answer, and the numbers behind it."""

    name: str
    agrees: bool | None
    """None: it could not be checked."""
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """One measured quantity, a value for each arm."""

    name: str
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """Checks over all arms and the facts that they rest on; `facts[i].values` follow `arms`."""

    arms: tuple[str, ...]
    checks: tuple[Check, ...]
    facts: tuple[Fact, ...]

    @property
    def agrees(self) -> bool | None:
        """None: no check differs, but some could not be made."""
        return _all_known([check.agrees for check in self.checks])

    @property
    def headline(self) -> str:
        if self.agrees:
            return "every check agrees" if len(self.arms) > 1 else "one arm alone: there is nothing to compare it with"
        failed = sum(check.agrees is False for check in self.checks)
        open_ = sum(check.agrees is None for check in self.checks)
        verdict = f"{failed} of {len(self.checks)} checks DIFFER" if failed else "no check differs"
        return f"{verdict}, {open_} could not be made" if open_ else verdict


def certify_run(run: Run) -> Certificate:
    """The certificate of a run directory, from all that its arms recorded."""
    return certify(
        run.results,
        configs={arm.name: arm.config for arm in run.arms},
        environments={arm.name: arm.environment for arm in run.arms},
        fingerprints={arm.name: {row.step: row.fingerprint for row in arm.metrics} for arm in run.arms},
        varies=run.experiment.get("varies", ()),
    )


def certify(
    results: Sequence[ArmResult],
    *,
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    environments: Mapping[str, Mapping[str, Any]] | None = None,
    fingerprints: Mapping[str, Mapping[int, str]] | None = None,
    varies: Sequence[str] = (),
) -> Certificate:
    """Checks finished arms against one another; mappings are by arm name.

    `fingerprints` are each arm's chained fingerprints by step: with them the first step at which arms part is named.
    `configs` are resolved configs, which may differ in the fields named by `varies`; `environments` what
    `environment.json` holds; checks that need one that is not given are left out, as are all checks between arms where
    there is only one.
    """
    assert results
    checks = []
    if len(results) > 1:
        checks.append(_same_data(results, fingerprints))
        checks += _same_identities(results, environments or {})
        checks.append(_same_counts(results))
        checks.append(_same_flops(results))
        checks += [one_recipe(configs, varies)] if configs else []
    checks.append(_ledger_is_xla(results))
    return Certificate(arms=tuple(result.arm for result in results), checks=tuple(checks), facts=tuple(_facts(results)))


def first_parting(fingerprints: Mapping[str, Mapping[int, str]]) -> int | None:
    """The first step whose fingerprint some arm lacks or has otherwise; None where all arms agree throughout.

    >>> first_parting({"a": {1: "x", 2: "y"}, "b": {1: "x", 2: "z"}})
    2
    """
    arms = list(fingerprints.values())
    for step in sorted(set().union(*arms)):
        if len({arm.get(step) for arm in arms}) > 1:
            return step
    return None


def _same_data(results: Sequence[ArmResult], fingerprints: Mapping[str, Mapping[int, str]] | None) -> Check:
    name = "same data in the same order"
    steps = fingerprints or {}
    for result in results:
        recorded = steps.get(result.arm)
        if recorded and recorded[max(recorded)] != result.fingerprint:
            detail = f"{result.arm}: the last fingerprint of its metrics is not that of its result; the files are mixed"
            return Check(name=name, agrees=False, detail=detail)
    if len({result.fingerprint for result in results}) == 1 and first_parting(steps) is None:
        detail = f"{results[0].steps:,} batches, chained fingerprint {results[0].fingerprint}"
        return Check(name=name, agrees=True, detail=detail)
    parting = first_parting(steps)
    if parting is None:
        detail = "the chained fingerprints are not the same"
    elif parting == min(min(arm, default=parting) for arm in steps.values()):
        detail = f"the arms part at their first step ({parting}): other order, tokenizer, dataset version or objective"
    else:
        detail = f"the arms agree up to step {parting - 1} and part at step {parting}: other examples or another order"
    return Check(name=name, agrees=False, detail=detail)


def _same_identities(results: Sequence[ArmResult], environments: Mapping[str, Mapping[str, Any]]) -> Iterator[Check]:
    for key, name in DATA_IDENTITIES.items():
        values = {result.arm: environments.get(result.arm, {}).get(key) for result in results}
        if any(value is not None for value in values.values()):
            agrees = len(set(map(str, values.values()))) == 1
            detail = str(values[results[0].arm]) if agrees else _by_arm(values)
            yield Check(name=name, agrees=agrees, detail=detail)


def _same_counts(results: Sequence[ArmResult]) -> Check:
    counts = {r.arm: (r.steps, r.examples, r.tokens, r.loss_tokens) for r in results}
    lines = {
        arm: f"{steps:,} steps, {examples:,} examples, {tokens:,} tokens, {loss_tokens:,} with loss"
        for arm, (steps, examples, tokens, loss_tokens) in counts.items()
    }
    agrees = len(set(counts.values())) == 1
    return Check(
        name="same steps, examples and tokens",
        agrees=agrees,
        detail=lines[results[0].arm] if agrees else _by_arm(lines),
    )


def _same_flops(results: Sequence[ArmResult]) -> Check:
    flops = [result.flops.full_attention for result in results]
    spread = max(flops) / min(flops) - 1 if min(flops) > 0 else math.inf
    counts = _by_arm({result.arm: scientific(result.flops.full_attention, 4) for result in results})
    return Check(
        name=f"training FLOPs within {100 * FLOPS_TOLERANCE:g} %",
        agrees=spread <= FLOPS_TOLERANCE,
        detail=f"{percent(spread, 2)} apart (full attention, padding included): {counts}",
    )


def _ledger_is_xla(results: Sequence[ArmResult]) -> Check:
    ratios = {r.arm: r.ledger_flops_per_step / r.xla_flops_per_step - 1 for r in results if r.xla_flops_per_step}
    signed = {arm: "+" * (ratio >= 0) + percent(ratio, 2) for arm, ratio in ratios.items()}
    reasons = {r.arm: f"not counted{f' ({r.why_not_counted})' if r.why_not_counted else ''}" for r in results}
    return Check(
        name=f"ledger = XLA within {100 * LEDGER_TOLERANCE:g} %",
        agrees=_all_known([_within_tolerance(ratios.get(r.arm)) for r in results]),
        detail=_by_arm(reasons | signed),
    )


def _within_tolerance(ratio: float | None) -> bool | None:
    return None if ratio is None else abs(ratio) <= LEDGER_TOLERANCE  # a NaN does not agree


def _all_known(answers: Sequence[bool | None]) -> bool | None:
    """
    >>> _all_known([True, True]), _all_known([True, None, False]), _all_known([True, None])
    (True, False, None)
    """
    return False if False in answers else None if None in answers else True


def one_recipe(configs: Mapping[str, Mapping[str, Any]], varies: Sequence[str]) -> Check:
    """Whether arms' resolved configs differ in nothing but sizes, rates, how they are computed, what a family has to
    itself, and what the comparison `varies` (a field, or all fields below it).

    A field that an arm lacks is absent, a value like any other.
    """
    flat = {arm: flatten(config) for arm, config in configs.items()}
    values = {path: {arm: config.get(path, ABSENT) for arm, config in flat.items()} for path in _paths(flat)}
    apart = [path for path, by_arm in values.items() if _differ(by_arm.values())]
    free = IDENTITY_FIELDS.union(varies)
    own = [path for path in apart if path.rsplit(".", 1)[-1] in OWN_FIELDS or _within(path, free) or only_how(path)]
    structure = [path for path in apart if path not in own and _of_one_family(path, values)]
    if wrong := [path for path in apart if path not in own and path not in structure]:
        detail = "; ".join(f"{path}: {_by_arm(values[path])}" for path in wrong)
        return Check(name="one recipe", agrees=False, detail=detail)
    told = [path for path in own if path not in IDENTITY_FIELDS] + structure
    shown = [f"{path} ({' / '.join(map(str, values[path].values()))})" for path in told]
    detail = f"{len(values) - len(apart)} shared fields are equal"
    detail += f"; each arm has its own {', '.join(shown)}" if shown else ""
    return Check(name="one recipe", agrees=True, detail=detail)


def _paths(flat: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The paths of any arm's fields. If some arms have an object and others null or {}, its fields stand for it."""
    paths = dict.fromkeys(path for config in flat.values() for path in config)
    inner = {path[:dot] for path in paths for dot in range(len(path)) if path[dot] == "."}
    return [
        path
        for path in paths
        if path not in inner or any(config.get(path) not in (None, {}) for config in flat.values())
    ]


def _of_one_family(path: str, values: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether `path` is a model's field that other kinds of model do not have, equal in all arms of the kind that has.

    Such fields distinguish the families.
    """
    kinds = values.get("model.kind", {})
    by_kind: dict[str, list[Any]] = {}
    for arm, value in values[path].items():
        by_kind.setdefault(kinds.get(arm, ABSENT), []).append(value)
    missing = [found for found in by_kind.values() if ABSENT in found]
    direct = path.startswith("model.") and path.count(".") == 1  # what lies deeper, a recipe, is every family's
    return direct and bool(missing) and not any(map(_differ, by_kind.values()))


def _within(path: str, fields: Collection[str]) -> bool:
    return any(path == field or path.startswith(f"{field}.") for field in fields)


def _differ(values: Iterable[Any]) -> bool:
    return len({repr(value) for value in values}) > 1


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted path; lists and empty mappings stay whole.

    >>> flatten({"model": {"d_ff": 8, "axes": [1, 2]}, "seed": 0})
    {'model.d_ff': 8, 'model.axes': [1, 2], 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
        ("FLOPs of a step in XLA's program", _counted),
        ("parameters", lambda r: f"{r.parameters:,} ({si(r.parameters)})"),
    ):
        yield Fact(name=name, values=tuple(show(result) for result in results))


def _counted(result: ArmResult) -> str:
    return scientific(result.xla_flops_per_step, 4) if result.xla_flops_per_step else "not counted"


def _by_arm(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{arm} {value}" for arm, value in values.items())
