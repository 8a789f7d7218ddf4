"""Loads a new run's parameters from stored ones: by name, with rules for those that differ.

Every parameter of the new model is accounted for: it is loaded, or a rule says that it is initialised ("fresh").
"""

import dataclasses
import difflib
import fnmatch
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from common.config import to_json
from common.errors import UserError, nearest
from common.model import Skeleton
from common.train.config import Fresh, InitRule, Rename, Resize
from common.train.stored import StoredParameters
from common.trees import flatten, nest

Shape = tuple[int, ...]
LISTED = 4
"""How many parameters that do not fit a message lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Where each parameter of the new model comes from."""

    sources: dict[str, str]
    """For each loaded parameter, its stored name."""
    resized: dict[str, int]
    """For each resized parameter, the dimension along which the stored one has another length."""
    fresh: tuple[str, ...]
    """Parameters that are initialised."""
    unused: tuple[str, ...]
    """Stored parameters that no parameter of the new model comes from."""

    def __str__(self) -> str:
        parts = [f"{len(self.sources)} parameters loaded"]
        for what, names in (("resized", self.resized), ("fresh", self.fresh), ("not used", self.unused)):
            if names:
                parts.append(f"{what}: {', '.join(sorted(names))}")
        return "; ".join(parts)


def make_load_plan(
    shapes: Mapping[str, Shape],
    axes: Mapping[str, tuple[str, ...]],
    stored: Mapping[str, Shape],
    rules: Sequence[InitRule],
    origin: str,
    where: str = "init",
) -> LoadPlan:
    """Plans where each parameter comes from.

    Args:
        shapes: Shapes of the new model's parameters, by dotted name.
        axes: Their logical axes.
        stored: Shapes of the stored parameters, by dotted name.
        origin: Names the stored parameters in messages.
        where: Path of the rules' config, for messages.

    Raises UserError for a rule that no parameter matches, and if parameters are missing from `stored` or have another
    shape there. The message lists these parameters and, if they are few, rules that would resolve them.
    """
    for rule in rules:
        if not fnmatch.filter(shapes, rule.leaves):
            raise UserError(f"{where}.rules: no parameter matches {rule.leaves!r}: {nearest(rule.leaves, shapes)}")
    sources: dict[str, str] = {}
    resized: dict[str, int] = {}
    fresh: list[str] = []
    faults: list[tuple[str, str]] = []
    for name, shape in shapes.items():
        if any(isinstance(rule, Fresh) and fnmatch.fnmatchcase(name, rule.leaves) for rule in rules):
            fresh.append(name)
            continue
        source = _source_name(name, rules)
        sources[name] = source
        if source not in stored:
            faults.append((name, f"there is no {source}"))
        elif stored[source] != shape:
            dim = _resized_dim(name, axes[name], rules)
            if dim is None or not _same_but(dim, shape, stored[source]):
                faults.append((name, f"{list(shape)} here, {list(stored[source])} there"))
            else:
                resized[name] = dim
    unused = tuple(sorted(set(stored) - set(sources.values())))
    if faults:
        listed = "; ".join(f"{name}: {fault}" for name, fault in faults[:LISTED])
        more = f"; and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        message = f"{origin} does not account for {len(faults)} of {len(shapes)} parameters: {listed}{more}"
        if more:  # it is another model: rules for so many parameters would amount to a fresh start
            raise UserError(message)
        rule_texts = [json.dumps(to_json(_suggested_rule(name, shapes, axes, stored, unused))) for name, _ in faults]
        raise UserError(f"{message}. Rules would, for example {where}.rules=[{', '.join(rule_texts)}]")
    return LoadPlan(sources=sources, resized=resized, fresh=tuple(fresh), unused=unused)


def check_rules(
    stored: StoredParameters, model: Skeleton, rules: Sequence[InitRule] = (), where: str = "init"
) -> LoadPlan:
    """Returns `make_load_plan` for `stored` and `model`; reads no parameter."""
    shapes = {name: tuple(leaf.shape) for name, leaf in flatten(model.shapes).items()}
    return make_load_plan(shapes, flatten(model.logical_axes), stored.shapes, rules, stored.origin, where)


def loads_tables(stored: StoredParameters, model: Skeleton, rules: Sequence[InitRule] = ()) -> bool:
    """Returns whether any parameter with a row per token is loaded."""
    axes = flatten(model.logical_axes)
    return any("vocab" in axes[name] for name in check_rules(stored, model, rules).sources)


def load_parameters(
    stored: StoredParameters,
    model: Skeleton,
    shardings: Any,
    *,
    rules: Sequence[InitRule] = (),
    seed: int = 0,
    dtype: Any = jnp.float32,
) -> tuple[Any, LoadPlan]:
    """Returns the parameters of `model` (a nested dict), created with their shardings, and where they came from.

    Fresh parameters are those that a new run with `seed` would have. Raises UserError as `make_load_plan` does, and if
    `stored` cannot be read.
    """
    plan, placed = check_rules(stored, model, rules), flatten(shardings)
    new = _fresh_leaves(model, placed, (*plan.fresh, *plan.resized), seed, dtype)
    first_user: dict[str, str] = {}  # of each stored parameter
    for name, source in plan.sources.items():
        first_user.setdefault(source, name)
    wanted = {
        source: jax.ShapeDtypeStruct(
            stored.shapes[source], dtype, sharding=_divisible(placed[name], stored.shapes[source])
        )
        for source, name in first_user.items()
    }
    found = stored.read(wanted)
    params = {name: new[name] for name in plan.fresh}
    for name, source in plan.sources.items():
        if name in plan.resized:
            params[name] = _with_overlap(new[name], found[source], placed[name])
        elif first_user[source] == name:
            params[name] = found[source]
        else:  # a step donates its arrays, so no two parameters may share one
            params[name] = jax.jit(jnp.copy, out_shardings=placed[name])(found[source])
    return nest(params), plan


def _source_name(name: str, rules: Sequence[InitRule]) -> str:
    """Returns the stored name of a parameter, by the first `Rename` that matches."""
    for rule in rules:
        if isinstance(rule, Rename) and fnmatch.fnmatchcase(name, rule.leaves):
            before, _, after = rule.leaves.partition("*")
            return rule.source.replace("*", name[len(before) : len(name) - len(after)])
    return name


def _resized_dim(name: str, axes: tuple[str, ...], rules: Sequence[InitRule]) -> int | None:
    """Returns the dimension that the first matching `Resize` allows to differ."""
    for rule in rules:
        if isinstance(rule, Resize) and fnmatch.fnmatchcase(name, rule.leaves):
            if rule.axis not in axes:
                raise UserError(f"init.rules: {name} has no axis {rule.axis!r}: {nearest(rule.axis, axes)}")
            return axes.index(rule.axis)
    return None


def _same_but(dim: int, one: Shape, other: Shape) -> bool:
    return len(one) == len(other) and all(a == b for i, (a, b) in enumerate(zip(one, other, strict=True)) if i != dim)


def _suggested_rule(
    name: str,
    shapes: Mapping[str, Shape],
    axes: Mapping[str, tuple[str, ...]],
    stored: Mapping[str, Shape],
    unused: Sequence[str],
) -> InitRule:
    """Returns the closest rule that resolves a parameter: another axis length, another name, or else fresh."""
    shape, found = shapes[name], stored.get(name)
    if found is not None:
        for dim, axis in enumerate(axes[name]):
            if axis in ("vocab", "positions") and _same_but(dim, shape, found):
                return Resize(leaves=name, axis=axis)
    alike = difflib.get_close_matches(name, [other for other in unused if stored[other] == shape], n=1, cutoff=0.7)
    return Rename(leaves=name, source=alike[0]) if alike else Fresh(leaves=name)


def _fresh_leaves(
    model: Skeleton, placed: Mapping[str, NamedSharding], names: Sequence[str], seed: int, dtype: Any
) -> dict[str, jax.Array]:
    """Returns the initial values of the named parameters; the compiler drops the computation of all others."""
    if not names:
        return {}

    def make() -> dict[str, jax.Array]:
        params = flatten(nnx.to_pure_dict(nnx.state(model.build(nnx.Rngs(params=jax.random.key(seed))))))
        return {name: params[name].astype(dtype) for name in names}

    return jax.jit(make, out_shardings={name: placed[name] for name in names})()


def _divisible(sharding: NamedSharding, shape: Shape) -> NamedSharding:
    """Returns `sharding`, replicated along dimensions that do not divide: a stored table may have another length."""
    spec = [
        None if axis is None or size % sharding.mesh.shape[axis] else axis
        for size, axis in zip(shape, sharding.spec, strict=True)
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _with_overlap(new: jax.Array, old: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns `new` with its overlap with `old` copied from `old`."""
    overlap = tuple(slice(min(a, b)) for a, b in zip(new.shape, old.shape, strict=True))
    return jax.jit(lambda new, old: new.at[overlap].set(old[overlap]), out_shardings=sharding)(new, old)
