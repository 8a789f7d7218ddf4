"""Configs as strict JSON, and edits by `path.to.field=value`.

A config is a frozen, keyword-only stdlib dataclass of plain values and further configs, also in `tuple[X, ...]` and
`dict[str, X]`. A field with variants is a union of dataclasses that each carry `kind: Literal["name"] = "name"`. This
module walks the dataclasses; pydantic checks the values in them.

>>> from typing import Literal
>>> @dataclasses.dataclass(frozen=True, kw_only=True)
... class Constant:
...     kind: Literal["constant"] = "constant"
>>> @dataclasses.dataclass(frozen=True, kw_only=True)
... class Linear:
...     kind: Literal["linear"] = "linear"
...     final: float = 0.0
>>> @dataclasses.dataclass(frozen=True, kw_only=True)
... class Train:
...     steps: int
...     schedule: Constant | Linear = Constant()
>>> to_json(Train(steps=10))
{'steps': 10, 'schedule': {'kind': 'constant'}}
>>> apply_overrides(Train(steps=10), ["steps=20", "schedule.kind=linear", "schedule.final=1e-2"])
Train(steps=20, schedule=Linear(kind='linear', final=0.01))
>>> apply_overrides(Train(steps=10), ["stpes=20"])
Traceback (most recent call last):
    ...
common.errors.UserError: unknown field 'stpes': did you mean 'steps'? Valid: schedule, steps
"""

import dataclasses
import functools
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import pydantic

from common.config_types import (
    child_types,
    chosen_member,
    field_types,
    holds_dataclass,
    is_dataclass,
    join_path,
    type_name,
    union_members,
    variant_of_kind,
    variants_by_kind,
    wrong_type,
)
from common.errors import UserError, nearest
from common.json_text import parse_json

Config = TypeVar("Config")

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""A NUL character in JSON text; neither paths nor templates may contain one."""
_STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


def to_json(config: Any) -> dict[str, Any]:
    """Returns a JSON object from which `from_json` restores an equal config.

    Raises UserError if a value has the wrong type.
    """
    restored = from_json(type(config), _as_json(config))
    assert restored == config, f"{config} would come back from JSON as {restored}"
    return _as_json(restored)


def from_json(cls: type[Config], data: Any) -> Config:
    """Restores what `to_json` returned: no field may be missing or unknown, and no value is coerced.

    The one exception: a whole number restores a float field, since JSON does not distinguish 1 from 1.0.

    Raises:
        UserError: names the path, and the nearest valid key or the expected type. An error from a config's own
            `__post_init__` is raised again with the path in front.
    """
    return _restore(cls, data, path="", defaults=False)


def from_earlier_json(cls: type[Config], data: Any) -> Config:
    """Restores what `to_json` of this or an earlier version returned: fields added since then take their defaults.

    Only for files that the project itself wrote. Raises UserError as `from_json` does.
    """
    return _restore(cls, data, path="", defaults=True)


def without_defaults(config: Any) -> dict[str, Any]:
    """Returns `to_json(config)` without the fields that have their default value, at every depth; `kind` stays.

    What identifies a config is taken from this, so that a field added later, with a default, changes no identity.
    """
    return _without_defaults(type(config), to_json(config), path="")


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Returns `config` with fields replaced; each override is `path.to.field=value`.

    The value is parsed as JSON; anything that is not JSON is taken as a string. A path consists of field names, keys
    of dicts and indices of tuples. The order of overrides does not matter: outer fields are set before inner ones, and
    a `kind` before the other fields of its variant. Of two values for one path, the last wins. Changing a `kind` keeps
    the fields that both variants have with the same type.

    Raises:
        UserError: as `from_json` does.
    """
    edits = [_parse_override(override) for override in overrides]
    data: Any = to_json(config)
    for keys, value in sorted(edits, key=lambda edit: (len(edit[0]), edit[0][-1] != "kind")):
        data = _with_value(type(config), data, keys, value, path="")
    return _restore(type(config), data, path="", defaults=True)


ABSENT = "(absent)"


@dataclasses.dataclass(frozen=True)
class Change:
    """One value that differs between two JSON configs."""

    path: str
    """Dotted path of the field."""
    before: str
    """JSON text, or `ABSENT`."""
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {self.before} -> {self.after}"


def difference(old: Any, new: Any) -> list[Change]:
    """Returns the values that differ between two JSON configs.

    >>> found = difference({"steps": 10, "model": {"d_ff": 4, "bias": True}}, {"steps": 20, "model": {"d_ff": 4}})
    >>> [str(change) for change in found]
    ['steps: 10 -> 20', 'model.bias: true -> (absent)']
    """
    before, after = dict(_leaves(old)), dict(_leaves(new))
    pairs = {path: (before.get(path, ABSENT), after.get(path, ABSENT)) for path in {**before, **after}}
    return [Change(path, a, b) for path, (a, b) in pairs.items() if a != b]


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


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yields path and JSON text of every leaf: a plain value, an empty object or an empty list."""
    items = data.items() if isinstance(data, dict) else [*enumerate(data)] if isinstance(data, list) else ()
    if not items:
        yield path, json.dumps(data)
    for key, value in items:
        yield from _leaves(value, join_path(path, str(key)))


def _as_json(value: Any) -> Any:
    """Converts dataclasses to dicts and tuples to lists, at every depth."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


# Restoring.


def _restore(annotation: Any, data: Any, path: str, defaults: bool) -> Any:
    """Converts JSON to an object of the annotated type; with `defaults`, fields that have a default may be missing."""
    if not holds_dataclass(annotation):
        return _restore_value(annotation, data, path)
    annotation = chosen_member(annotation, data, path)
    if annotation is types.NoneType:
        return None
    if is_dataclass(annotation):
        return _restore_dataclass(annotation, data, path, defaults)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict and arguments[0] is str:
        if not isinstance(data, dict):
            raise wrong_type(annotation, data, path)
        return {key: _restore(arguments[1], item, join_path(path, key), defaults) for key, item in data.items()}
    assert arguments[1:] == (...,), f"{path}: {annotation} can hold no configs, only tuple[X, ...] and dict[str, X] can"
    if not isinstance(data, list):
        raise wrong_type(annotation, data, path)
    return tuple(_restore(arguments[0], item, join_path(path, str(i)), defaults) for i, item in enumerate(data))


def _restore_dataclass(cls: Any, data: Any, path: str, defaults: bool) -> Any:
    fields = child_types(cls, data, path)
    for key in data:
        if key not in fields:
            raise _unknown_field(key, fields, path)
    optional = _defaults(cls) if defaults else {}
    missing = [name for name in fields if name not in data and name not in optional]
    if missing:
        raise UserError(f"{path or cls.__name__}: {', '.join(map(repr, missing))} missing")
    values = {
        name: _restore(fields[name], data[name], join_path(path, name), defaults) for name in fields if name in data
    }
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from error


@functools.cache
def _adapter(annotation: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(annotation, config=_STRICT)


def _restore_value(annotation: Any, data: Any, path: str) -> Any:
    text = json.dumps(data)
    if _NUL.search(text):
        raise UserError(f"{path}: the text contains a NUL character")
    try:
        # As text, because pydantic's strict mode accepts a list for a tuple only when it parses JSON.
        value = _adapter(annotation).validate_json(text)
    except pydantic.ValidationError as error:
        choices = [choice for member in union_members(annotation) for choice in typing.get_args(member)]
        if isinstance(data, str) and any(isinstance(choice, str) for choice in choices):
            raise UserError(f"{path}: unknown value {data!r}: {nearest(data, map(str, choices))}") from None
        finite = " that is finite" if error.errors()[0]["type"] == "finite_number" else ""
        raise UserError(f"{path}: expected {type_name(annotation)}{finite}, got {json.dumps(data)}") from None
    if typing.get_origin(annotation) is Literal and type(value) is not type(data):  # 1 == 1.0 == True
        raise wrong_type(annotation, data, path)
    return value


def _unknown_field(key: str, valid: dict[str, Any], path: str) -> UserError:
    return UserError(f"unknown field {key!r}{f' in {path}' if path else ''}: {nearest(key, valid)}")


def _without_defaults(annotation: Any, data: Any, path: str) -> Any:
    if not holds_dataclass(annotation) or data is None:
        return data
    annotation = chosen_member(annotation, data, path)
    children = child_types(annotation, data, path)
    if isinstance(data, list):
        return [_without_defaults(children[str(i)], item, join_path(path, str(i))) for i, item in enumerate(data)]
    defaults = _defaults(annotation) if is_dataclass(annotation) else {}
    return {
        key: _without_defaults(children[key], value, join_path(path, key))
        for key, value in data.items()
        if key == "kind" or key not in defaults or defaults[key] != value
    }


# Overriding.


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"{override!r} is not an override; valid: path.to.field=value")
    try:
        return path.split("."), parse_json(text, finite=False)
    except json.JSONDecodeError:
        return path.split("."), text
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _defaults(cls: Any) -> dict[str, Any]:
    """Returns the default of every field that has one, as JSON."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            values[field.name] = _as_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = _as_json(field.default_factory())
    return values


def _with_value(annotation: Any, data: Any, keys: list[str], value: Any, path: str) -> Any:
    """Returns `data` with `value` at the path `keys`. The result need not be valid: later edits may complete it."""
    if not keys:
        return value
    if keys == ["kind"] and variants_by_kind(annotation):
        return _with_kind(annotation, data, value, path)
    if data is None:  # an optional config that is absent: start from its defaults
        annotation = chosen_member(annotation, {}, path)
        data = _defaults(annotation) if is_dataclass(annotation) else None
    else:
        annotation = chosen_member(annotation, data, path)
    key, *rest = keys
    children = child_types(annotation, data, path)
    if key not in children:
        raise _unknown_field(key, children, path)
    if isinstance(data, list):
        i = int(key)
        return [*data[:i], _with_value(children[key], data[i], rest, value, join_path(path, key)), *data[i + 1 :]]
    return {**data, key: _with_value(children[key], data.get(key), rest, value, join_path(path, key))}


def _with_kind(annotation: Any, data: Any, kind: Any, path: str) -> dict[str, Any]:
    """Switches `data` to the variant `kind`: its defaults, then the values of fields that both variants have.

    A field is kept if its name and type are the same in both:

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class AdamW:
    ...     kind: Literal["adamw"] = "adamw"
    ...     learning_rate: float = 0.001
    ...     weight_decay: float = 0.1
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Sgd:
    ...     kind: Literal["sgd"] = "sgd"
    ...     learning_rate: float = 0.5
    ...     momentum: float = 0.9
    >>> before = {"kind": "adamw", "learning_rate": 0.003, "weight_decay": 0.2}
    >>> _with_kind(AdamW | Sgd, before, "sgd", path="train.optimizer")
    {'kind': 'sgd', 'learning_rate': 0.003, 'momentum': 0.9}
    """
    new = variant_of_kind(annotation, kind, path)
    data = data or {}
    old_types = field_types(chosen_member(annotation, data, path)) if data else {}
    kept = {name: data[name] for name, of in field_types(new).items() if name in data and old_types.get(name) == of}
    return {**_defaults(new), **kept, "kind": kind}
