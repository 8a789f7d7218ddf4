"""Reads the annotations of config fields: which types a field allows, and which of these types JSON data has.

JSON in a field annotated `AdamW | Sgd | None`, both dataclasses with a `kind`:

    null                                     None
    {"kind": "sgd", "learning_rate": 1.0}    Sgd, whose `kind` is "sgd"
    {"learning_rate": 1.0}                   UserError: 'kind' is missing; valid: adamw, sgd

`Average | None` offers no choice of dataclass, so `Average` needs no `kind`.
"""

import dataclasses
import functools
import json
import types
import typing
from typing import Any

from common.errors import UserError, nearest


def join_path(path: str, key: str) -> str:
    """Appends the key of a field or item to a dotted path; the path of the whole config is "".

    >>> join_path("train.betas", "0"), join_path("", "train")
    ('train.betas.0', 'train')
    """
    return f"{path}.{key}" if path else key


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Returns the annotation of each field of a dataclass, in the order of the fields."""
    hints = typing.get_type_hints(cls)  # strips Annotated and its Range, which the config's __post_init__ checks
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Returns the members of a union; for any other annotation, the annotation alone."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def is_dataclass(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def holds_dataclass(annotation: Any) -> bool:
    """Returns whether a dataclass occurs anywhere in the annotation, as in `tuple[AdamW, ...]`."""
    return is_dataclass(annotation) or any(map(holds_dataclass, typing.get_args(annotation)))


def variants_by_kind(annotation: Any) -> dict[str, Any]:
    """Returns kind -> dataclass for a union of several dataclasses; empty for any other annotation."""
    members = [member for member in union_members(annotation) if member is not types.NoneType]
    if len(members) < 2 or not holds_dataclass(annotation):
        return {}
    # The annotation of `kind` is a Literal, whose arguments are the kinds.
    pairs = [(kind, member) for member in members for kind in typing.get_args(field_types(member)["kind"])]
    assert len(dict(pairs)) == len(pairs), f"two variants of {annotation} share a kind"
    return dict(pairs)


def variant_of_kind(annotation: Any, kind: Any, path: str) -> Any:
    """Returns the dataclass of the union that has the `kind`. Raises UserError, which names `path`, if none has."""
    variants = variants_by_kind(annotation)
    if not isinstance(kind, str) or kind not in variants:
        raise UserError(f"{join_path(path, 'kind')}: unknown kind {json.dumps(kind)}: {nearest(str(kind), variants)}")
    return variants[kind]


def chosen_member(annotation: Any, data: Any, path: str) -> Any:
    """Returns the member of a union that `data` is an instance of, as JSON.

    This is NoneType for None, and the variant that the `kind` in `data` names. Where there is no choice of dataclass,
    it is the first member that is not None, whatever `data` is. Raises UserError if `data` has no valid `kind`.
    """
    if data is None and types.NoneType in union_members(annotation):
        return types.NoneType
    if not variants_by_kind(annotation):
        return next(member for member in union_members(annotation) if member is not types.NoneType)
    if not isinstance(data, dict):
        raise wrong_type(annotation, data, path)
    if "kind" not in data:
        raise UserError(f"{path}: 'kind' is missing; valid: {', '.join(sorted(variants_by_kind(annotation)))}")
    return variant_of_kind(annotation, data["kind"], path)


def child_types(annotation: Any, data: Any, path: str) -> dict[str, Any]:
    """Returns the annotation of each key that may follow `path`; empty for a plain value.

    A dataclass has all of its fields as keys, a dict or list the keys or indices of `data`:

    >>> child_types(dict[str, float], {"a": 1.0}, "weights"), child_types(tuple[int, ...], [5, 6], "sizes")
    ({'a': <class 'float'>}, {'0': <class 'int'>, '1': <class 'int'>})
    >>> child_types(int, [5, 6], "steps")
    {}
    """
    if is_dataclass(annotation):
        if not isinstance(data, dict):
            raise wrong_type(annotation, data, path)
        return field_types(annotation)
    arguments = typing.get_args(annotation)
    if not arguments:
        return {}
    if isinstance(data, dict):
        return dict.fromkeys(data, arguments[-1])
    return dict.fromkeys(map(str, range(len(data))), arguments[0]) if isinstance(data, list) else {}


def wrong_type(annotation: Any, data: Any, path: str) -> UserError:
    """Returns the error to raise where `data` at `path` is not of the annotated type."""
    return UserError(f"{path or 'config'}: expected {type_name(annotation)}, got {json.dumps(data)}")


def type_name(annotation: Any) -> str:
    """Returns the name of a type for messages; a union of several dataclasses is named by their kinds."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    variants = variants_by_kind(annotation)
    return f"an object of kind {', '.join(sorted(variants))}" if variants else str(annotation).replace("typing.", "")
