"""The parity certificate: did all arms get the same data and compute, and does XLA's count confirm the ledger's?"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from common.compute.ledger import FLOPS_TOLERANCE
from common.report.results import ArmResult
from common.report.run_files import ComparisonRun
from common.report.units import fill, percent, scientific, si
from common.train.config import decides_result

LEDGER_TOLERANCE = 0.02
"""Largest relative difference between the ledger and XLA's count of FLOPs."""

OWN_FIELDS = frozenset(
    {"d_ff", "d_model", "head_dim", "num_heads", "num_kv_heads", "num_layers"}
    | {"encoder_layers", "decoder_layers", "learning_rate"}
)
"""Last names of config fields that may differ between arms: sizes, which match compute, and the tuned learning rate."""
IDENTITY_FIELDS = frozenset({"arm", "about", "model.kind"})
"""Config fields that say which arm it is; they always differ."""
DATA_IDENTITIES = {"content_id": "same dataset version", "tokenizer_hash": "same tokenizer"}
"""Entries of environment.json that must be equal, with the name of the check."""


class _Absent:
    """Stands for a field that an arm's config does not have; differs from every value of a config."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A question, its answer and the numbers that support it."""

    name: str
    agrees: bool | None
    """None if it could not be checked."""
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A quantity, with one value per arm."""

    name: str
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """Checks over all arms, and the facts that support them; `facts[i].values` has the order of `arms`."""

    arms: tuple[str, ...]
    checks: tuple[Check, ...]
    facts: tuple[Fact, ...]

    @property
    def agrees(self) -> bool | None:
        """Whether all checks agree; None if none differs but some could not be made."""
        return _all_agree([check.agrees for check in self.checks])

    @property
    def headline(self) -> str:
        if self.agrees:
            return "every check agrees" if len(self.arms) > 1 else "only one arm: nothing to compare"
        failed = sum(check.agrees is False for check in self.checks)
        unmade = sum(check.agrees is None for check in self.checks)
        verdict = f"{failed} of {len(self.checks)} checks DIFFER" if failed else "no check differs"
        return f"{verdict}, {unmade} could not be made" if unmade else verdict


def certify_run(run: ComparisonRun) -> Certificate:
    """Certifies a run directory from everything that its arms recorded."""
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
    """Checks finished arms against each other.

    All mappings are by arm name; checks without their mapping are skipped, as are, with one arm, checks between arms.

    Args:
      configs: resolved configs.
      environments: contents of `environment.json`.
      fingerprints: chained fingerprints by step; they give the first step at which arms differ.
      varies: config fields that the comparison is about, so they may differ.
    """
    assert results
    checks = []
    if len(results) > 1:
        checks.append(_same_data(results, fingerprints))
        checks += _same_identities(results, environments or {})
        checks.append(_same_counts(results))
        checks.append(_same_flops(results))
        checks += [one_recipe(configs, varies)] if configs else []
    checks.append(_ledger_matches_xla(results))
    return Certificate(arms=tuple(result.arm for result in results), checks=tuple(checks), facts=tuple(_facts(results)))


def first_difference(fingerprints: Mapping[str, Mapping[int, str]]) -> int | None:
    """Returns the first step whose fingerprint differs between arms or is missing in one; None if there is none.

    >>> first_difference({"a": {1: "x", 2: "y"}, "b": {1: "x", 2: "z"}})
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
            detail = f"{result.arm}: the last fingerprint in its metrics is not the one in its result: mixed files"
            return Check(name=name, agrees=False, detail=detail)
    if len({result.fingerprint for result in results}) == 1 and first_difference(steps) is None:
        detail = f"{results[0].steps:,} batches, chained fingerprint {results[0].fingerprint}"
        return Check(name=name, agrees=True, detail=detail)
    step = first_difference(steps)
    if step is None:
        detail = "the chained fingerprints differ"
    elif step == min(min(arm, default=step) for arm in steps.values()):
        detail = f"the arms differ from their first step ({step}): other order, tokenizer, dataset version or objective"
    else:
        detail = f"the arms agree up to step {step - 1} and differ from step {step}: other examples or another order"
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


def _ledger_matches_xla(results: Sequence[ArmResult]) -> Check:
    ratios = {r.arm: r.ledger_flops_per_step / r.xla_flops_per_step - 1 for r in results if r.xla_flops_per_step}
    signed = {arm: "+" * (ratio >= 0) + percent(ratio, 2) for arm, ratio in ratios.items()}
    reasons = {r.arm: f"not counted{f' ({r.why_not_counted})' if r.why_not_counted else ''}" for r in results}
    return Check(
        name=f"ledger = XLA within {100 * LEDGER_TOLERANCE:g} %",
        agrees=_all_agree([_within_tolerance(ratios.get(r.arm)) for r in results]),
        detail=_by_arm(reasons | signed),
    )


def _within_tolerance(ratio: float | None) -> bool | None:
    return None if ratio is None else abs(ratio) <= LEDGER_TOLERANCE  # False for NaN


def _all_agree(answers: Sequence[bool | None]) -> bool | None:
    """Returns False if any check differs, else None if any could not be made, else True.

    >>> _all_agree([True, True]), _all_agree([True, None, False]), _all_agree([True, None])
    (True, False, None)
    """
    return False if False in answers else None if None in answers else True


def one_recipe(configs: Mapping[str, Mapping[str, Any]], varies: Sequence[str]) -> Check:
    """Checks that arms' resolved configs are equal, except in what may differ.

    These may: sizes and the learning rate, how a run is computed, what only one family has, and what the comparison
    `varies` (a field, or all fields below it). A field that an arm does not have counts as a value, `ABSENT`.
    """
    values = _values_by_field(configs)
    unequal = {field: by_arm for field, by_arm in values.items() if _differ(by_arm.values())}
    allowed = [field for field in unequal if _may_differ(field, varies)]
    family = [field for field in unequal if field not in allowed and _is_of_one_family(field, values)]
    if wrong := [field for field in unequal if field not in allowed and field not in family]:
        detail = "; ".join(f"{field}: {_by_arm(values[field])}" for field in wrong)
        return Check(name="one recipe", agrees=False, detail=detail)
    own = [field for field in allowed if field not in IDENTITY_FIELDS] + family
    shown = [f"{field} ({' / '.join(map(str, values[field].values()))})" for field in own]
    detail = f"{len(values) - len(unequal)} shared fields are equal"
    detail += f"; each arm has its own {', '.join(shown)}" if shown else ""
    return Check(name="one recipe", agrees=True, detail=detail)


def _values_by_field(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns each arm's value of every field that some arm has, by dotted path.

    Where some arms have an object and others have null or {}, only the object's fields count.
    """
    fields = {arm: dotted_fields(config) for arm, config in configs.items()}
    paths = dict.fromkeys(path for config in fields.values() for path in config)
    prefixes = {path[:dot] for path in paths for dot in range(len(path)) if path[dot] == "."}

    def is_empty_object(path: str) -> bool:
        return path in prefixes and all(config.get(path) in (None, {}) for config in fields.values())

    return {
        path: {arm: config.get(path, ABSENT) for arm, config in fields.items()}
        for path in paths
        if not is_empty_object(path)
    }


def _may_differ(field: str, varies: Sequence[str]) -> bool:
    """Returns whether arms may set a field differently, whatever their families."""
    named = IDENTITY_FIELDS.union(varies)
    is_named = any(field == name or field.startswith(f"{name}.") for name in named)
    return is_named or field.rsplit(".", 1)[-1] in OWN_FIELDS or not decides_result(field)


def _is_of_one_family(field: str, values: Mapping[str, Mapping[str, Any]]) -> bool:
    """Returns whether a field belongs to some kinds of model only and is equal in all arms of the same kind."""
    kinds = values.get("model.kind", {})
    by_kind: dict[str, list[Any]] = {}
    for arm, value in values[field].items():
        by_kind.setdefault(kinds.get(arm, ABSENT), []).append(value)
    is_missing_in_a_kind = any(ABSENT in found for found in by_kind.values())
    is_direct = field.startswith("model.") and field.count(".") == 1  # deeper fields, a recipe's, are in every family
    return is_direct and is_missing_in_a_kind and not any(map(_differ, by_kind.values()))


def _differ(values: Iterable[Any]) -> bool:
    return len({repr(value) for value in values}) > 1


def dotted_fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the fields of nested mappings by dotted path; lists and empty mappings are values.

    >>> dotted_fields({"model": {"d_ff": 8, "axes": [1, 2]}, "seed": 0})
    {'model.d_ff': 8, 'model.axes': [1, 2], 'seed': 0}
    """
    fields: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            fields |= dotted_fields(value, f"{prefix}{key}.")
        else:
            fields[f"{prefix}{key}"] = value
    return fields


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


def _by_arm(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{arm} {value}" for arm, value in values.items())
