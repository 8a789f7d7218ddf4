"""Is it one recipe: do runs differ in those config fields only in which they may?"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.config import dotted_fields
from common.report.checks import Check, by_name
from common.train.config import decides_result

OWN_FIELDS = frozenset(
    {"d_ff", "d_model", "head_dim", "num_heads", "num_kv_heads", "num_layers"}
    | {"encoder_layers", "decoder_layers", "learning_rate"}
)
"""Last names of config fields that may differ between arms: sizes, which match compute, and the tuned learning rate."""
IDENTITY_FIELDS = ("arm", "about", "labels", "model.kind", "after.identity")
"""Config fields that say which arm it is, or which arm it starts from; they always differ."""


class _Absent:
    """Stands for a field that a run's config does not have; differs from every value of a config."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def one_recipe(configs: Mapping[str, Mapping[str, Any]], apart: Sequence[str]) -> Check:
    """Checks that runs' resolved configs, by name, are equal, except in what may differ.

    These may: sizes and the learning rate, how a run is computed, what only one family has, and what the study takes
    `apart` (patterns of fields; a field stands for all below it too). A field that a run does not have counts as a
    value, `ABSENT`.
    """
    values = _values_by_field(configs)
    unequal = {field: by_arm for field, by_arm in values.items() if _differ(by_arm.values())}
    allowed = [field for field in unequal if _may_differ(field, apart)]
    family = [field for field in unequal if field not in allowed and _is_of_one_family(field, values)]
    if wrong := [field for field in unequal if field not in allowed and field not in family]:
        detail = "; ".join(f"{field}: {by_name(values[field])}" for field in wrong)
        return Check(name="one recipe", agrees=False, detail=detail)
    own = [field for field in allowed if not _is_named(field, IDENTITY_FIELDS)] + family
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


def _may_differ(field: str, apart: Sequence[str]) -> bool:
    """Returns whether runs may set a field differently, whatever their families."""
    is_named = _is_named(field, [*IDENTITY_FIELDS, *apart])
    return is_named or field.rsplit(".", 1)[-1] in OWN_FIELDS or not decides_result(field)


def _is_named(field: str, patterns: Iterable[str]) -> bool:
    """Returns whether a pattern names a field, or one that it lies below.

    >>> _is_named("labels.width", ["labels"]), _is_named("model.d_ff", ["model.memory"])
    (True, False)
    """
    return any(fnmatch.fnmatchcase(field, p) or fnmatch.fnmatchcase(field, f"{p}.*") for p in patterns)


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
