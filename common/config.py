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
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeVar

import pydantic

from common.errors import UserError, nearest
from common.json_text import parse_json

Config = TypeVar("Config")

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""A NUL character in JSON; no path and no template may hold one."""
_STRICT = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


def to_json(config: Any) -> dict[str, Any]:
    """The JSON object from which `from_json` restores an equal config; raises UserError on a value of a wrong type."""
    restored = from_json(type(config), _plain(config))
    assert restored == config, f"{config} would come back from JSON as {restored}"
    return _plain(restored)


def from_json(cls: type[Config], data: Any) -> Config:
    """Restores what `to_json` wrote: every field must be there, nothing else may be, and no value is coerced.

    The one exception: a whole number restores a float field, since JSON does not tell 1 from 1.0.

    Raises:
        UserError: naming the path and the nearest valid key or the expected type; the message of a config's own
            `__post_init__` comes through behind its path.
    """
    return _restore(cls, data, path="", defaults=False)


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with fields replaced; each override is `path.to.field=value`.

    The value is read as JSON, and as a bare string where it is none. A path leads through dataclasses, keys of
    dicts and places in tuples. Outer fields are set before inner ones, and a `kind` before its variant's other
    fields, in whatever order they come; of two values for one path the last one wins. Changing a `kind` keeps the
    fields that both variants have with the same type.

    Raises:
        UserError: as `from_json` does.
    """
    edits = [_parse_override(override) for override in overrides]
    data: Any = to_json(config)
    for keys, value in sorted(edits, key=lambda edit: len(edit[0]) - (0.5 if edit[0][-1] == "kind" else 0.0)):
        data = _edited(type(config), data, keys, value, path="")
    return _restore(type(config), data, path="", defaults=True)


def difference(old: Any, new: Any) -> list[str]:
    """One line for each value that differs between two JSON configs.

    >>> difference({"steps": 10, "model": {"d_ff": 4, "bias": True}}, {"steps": 20, "model": {"d_ff": 4}})
    ['steps: 10 -> 20', 'model.bias: true -> (absent)']
    """
    before, after = dict(_flat(old)), dict(_flat(new))
    absent = "(absent)"
    pairs = {path: (before.get(path, absent), after.get(path, absent)) for path in {**before, **after}}
    return [f"{path}: {a} -> {b}" for path, (a, b) in pairs.items() if a != b]


def _flat(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and JSON text of every plain value."""
    items = data.items() if isinstance(data, dict) else [*enumerate(data)] if isinstance(data, list) else ()
    if not items:
        yield path, json.dumps(data)
    for key, value in items:
        yield from _flat(value, _join(path, str(key)))


def _plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, all the way down."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# What an annotation says.


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)  # without the ranges, which each config checks for itself
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _members(annotation: Any) -> tuple[Any, ...]:
    """Of a union; of anything else, itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_dataclass(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _holds_dataclass(annotation: Any) -> bool:
    return _is_dataclass(annotation) or any(map(_holds_dataclass, typing.get_args(annotation)))


def _variants(annotation: Any) -> dict[str, Any]:
    """The dataclasses of a union by their `kind`; empty where there is no choice."""
    members = [member for member in _members(annotation) if member is not types.NoneType]
    if len(members) < 2 or not _holds_dataclass(annotation):
        return {}
    pairs = [(kind, member) for member in members for kind in typing.get_args(_field_types(member)["kind"])]
    assert len(dict(pairs)) == len(pairs), f"two variants of {annotation} share a kind"
    return dict(pairs)


def _variant(annotation: Any, kind: Any, path: str) -> Any:
    variants = _variants(annotation)
    if not isinstance(kind, str) or kind not in variants:
        raise UserError(f"{_join(path, 'kind')}: unknown kind {json.dumps(kind)}: {nearest(str(kind), variants)}")
    return variants[kind]


def _narrowed(annotation: Any, data: Any, path: str) -> Any:
    """The one member of a union that `data` belongs to."""
    if data is None and types.NoneType in _members(annotation):
        return types.NoneType
    if not _variants(annotation):
        return next(member for member in _members(annotation) if member is not types.NoneType)
    if not isinstance(data, dict):
        raise _wrong_type(annotation, data, path)
    if "kind" not in data:
        raise UserError(f"{path}: 'kind' is missing; valid: {', '.join(sorted(_variants(annotation)))}")
    return _variant(annotation, data["kind"], path)


def _children(annotation: Any, data: Any, path: str) -> dict[str, Any]:
    """The types of what lies one key below; empty for a plain value."""
    if _is_dataclass(annotation):
        if not isinstance(data, dict):
            raise _wrong_type(annotation, data, path)
        return _field_types(annotation)
    arguments = typing.get_args(annotation)
    if isinstance(data, dict):
        return dict.fromkeys(data, arguments[-1])
    return dict.fromkeys(map(str, range(len(data))), arguments[0]) if isinstance(data, list) else {}


# Restoring.


def _restore(annotation: Any, data: Any, path: str, defaults: bool) -> Any:
    """`data` as an object of that type; with `defaults`, fields that have one may be missing."""
    if not _holds_dataclass(annotation):
        return _restore_value(annotation, data, path)
    annotation = _narrowed(annotation, data, path)
    if annotation is types.NoneType:
        return None
    if _is_dataclass(annotation):
        return _restore_dataclass(annotation, data, path, defaults)
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict and arguments[0] is str:
        if not isinstance(data, dict):
            raise _wrong_type(annotation, data, path)
        return {key: _restore(arguments[1], item, _join(path, key), defaults) for key, item in data.items()}
    assert arguments[1:] == (...,), f"{path}: {annotation} can hold no configs, only tuple[X, ...] and dict[str, X] can"
    if not isinstance(data, list):
        raise _wrong_type(annotation, data, path)
    return tuple(_restore(arguments[0], item, _join(path, str(i)), defaults) for i, item in enumerate(data))


def _restore_dataclass(cls: Any, data: Any, path: str, defaults: bool) -> Any:
    fields = _children(cls, data, path)
    for key in data:
        if key not in fields:
            raise _unknown_field(key, fields, path)
    optional = _defaults(cls) if defaults else {}
    missing = [name for name in fields if name not in data and name not in optional]
    if missing:
        raise UserError(f"{path or cls.__name__}: {', '.join(map(repr, missing))} missing")
    values = {name: _restore(fields[name], data[name], _join(path, name), defaults) for name in fields if name in data}
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
        raise UserError(f"{path}: a text holds a NUL character")
    try:
        # By way of text: only there does pydantic's strictness take a list for a tuple.
        value = _adapter(annotation).validate_json(text)
    except pydantic.ValidationError as error:
        choices = [choice for member in _members(annotation) for choice in typing.get_args(member)]
        if isinstance(data, str) and any(isinstance(choice, str) for choice in choices):
            raise UserError(f"{path}: unknown value {data!r}: {nearest(data, map(str, choices))}") from None
        finite = " that is finite" if error.errors()[0]["type"] == "finite_number" else ""
        raise UserError(f"{path}: expected {_type_name(annotation)}{finite}, got {json.dumps(data)}") from None
    if typing.get_origin(annotation) is Literal and type(value) is not type(data):  # 1 == 1.0 == True
        raise _wrong_type(annotation, data, path)
    return value


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    variants = _variants(annotation)
    return f"an object of kind {', '.join(sorted(variants))}" if variants else str(annotation).replace("typing.", "")


def _wrong_type(annotation: Any, data: Any, path: str) -> UserError:
    return UserError(f"{path or 'config'}: expected {_type_name(annotation)}, got {json.dumps(data)}")


def _unknown_field(key: str, valid: dict[str, Any], path: str) -> UserError:
    return UserError(f"unknown field {key!r}{f' in {path}' if path else ''}: {nearest(key, valid)}")


# Overriding.


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"{override!r} is no override; valid: path.to.field=value")
    try:
        return path.split("."), parse_json(text, finite=False)
    except json.JSONDecodeError:
        return path.split("."), text
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _defaults(cls: Any) -> dict[str, Any]:
    """The fields that need not be given, as JSON."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            values[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = _plain(field.default_factory())
    return values


def _edited(annotation: Any, data: Any, keys: list[str], value: Any, path: str) -> Any:
    """`data`, which need not be valid yet, with `value` at `keys` below it."""
    if not keys:
        return value
    if keys == ["kind"] and _variants(annotation):
        return _with_kind(annotation, data, value, path)
    if data is None:  # an optional config that was left out
        annotation = _narrowed(annotation, {}, path)
        data = _defaults(annotation) if _is_dataclass(annotation) else None
    else:
        annotation = _narrowed(annotation, data, path)
    key, *rest = keys
    children = _children(annotation, data, path)
    if key not in children:
        raise _unknown_field(key, children, path)
    if isinstance(data, list):
        i = int(key)
        return [*data[:i], _edited(children[key], data[i], rest, value, _join(path, key)), *data[i + 1 :]]
    return {**data, key: _edited(children[key], data.get(key), rest, value, _join(path, key))}


def _with_kind(annotation: Any, data: Any, kind: Any, path: str) -> dict[str, Any]:
    """The variant of that kind: its defaults, under what it shares with the variant that `data` is of."""
    new = _variant(annotation, kind, path)
    data = data or {}
    old = _field_types(_narrowed(annotation, data, path)) if data else {}
    shared = [name for name, of in _field_types(new).items() if name in data and old.get(name) == of]
    return {**_defaults(new), **{name: data[name] for name in shared}, "kind": kind}
