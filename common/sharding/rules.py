"""Logical axis names, and the table that maps them to mesh axes: once as parameters are stored, once as they are used.

Stored parameters, their gradients and the optimizer's state are split over `fsdp` and `tensor`. To be used, a layer's
parameters are gathered along `fsdp` (ZeRO, arXiv 1910.02054, stage 3); what is split along `tensor` stays so (Megatron,
arXiv 1909.08053). Between that axis's products the residual stream is whole, or split along its length too (arXiv
2205.05198): that is what the two strategies differ in.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.sharding.shape import ROW_AXES

Axis = str | tuple[str, ...] | None
Strategy = Literal["fsdp", "sequence"]
GATHERED = "gathered"
"""Name under which rematerialisation finds gathered parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Mesh axes by logical name."""

    parameters: Mapping[str, Axis]
    """Of parameters, gradients and optimizer state as they lie between steps."""
    compute: Mapping[str, Axis]
    """Of parameters where they are used, and of activations."""


_STORED: Mapping[str, Axis] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "buckets": None,
    "positions": None,
}
_USED: Mapping[str, Axis] = {**_STORED, "embed": None, "batch": ROW_AXES, "length": "context", "residual": "context"}

STRATEGIES: Mapping[str, Rules] = {
    "fsdp": Rules(parameters=_STORED, compute=_USED),
    "sequence": Rules(parameters=_STORED, compute={**_USED, "residual": ("context", "tensor")}),
}

_strategy: contextvars.ContextVar[Strategy] = contextvars.ContextVar("sharding strategy", default="fsdp")


@contextlib.contextmanager
def strategy(name: Strategy) -> Iterator[None]:
    """Which table programs traced within follow."""
    token = _strategy.set(name)
    try:
        yield
    finally:
        _strategy.reset(token)


def stored_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """The mesh axes of a stored parameter whose dimensions have these logical names.

    >>> stored_spec(("layers", "embed", "mlp"))
    P(None, 'fsdp', 'tensor')
    """
    return _spec(STRATEGIES[_strategy.get()].parameters, axes)


def compute_spec(*axes: str | None) -> PartitionSpec:
    """The mesh axes of an activation, or of a parameter in use (None: not split).

    >>> compute_spec("embed", "mlp"), compute_spec("batch", "length", "heads", None)
    (P(None, 'tensor'), P(('replica', 'data', 'fsdp'), 'context', 'tensor', None))
    """
    return _spec(STRATEGIES[_strategy.get()].compute, axes)


def _spec(rules: Mapping[str, Axis], axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def on_mesh() -> bool:
    """Whether the program that is traced runs on several devices that the rules can divide it among."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not mesh.manual_axes


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation's sharding by logical names; without a mesh, `x` itself.

    A dimension that does not divide by its devices, as the length of what is decoded one token at a time, stays whole.
    """
    if not on_mesh():
        return x
    dividing = (axis if size % parts(axis) == 0 else None for size, axis in zip(x.shape, axes, strict=True))
    return jax.lax.with_sharding_constraint(x, compute_spec(*dividing))


_IN_LAYER, _BETWEEN = ("batch", "length", None), ("batch", "residual", None)


def enter(x_BLD: jax.Array) -> jax.Array:
    """The residual stream as a layer's products read it; its gradient is asked for as the stream lies."""
    return _moved(x_BLD, _IN_LAYER, _BETWEEN)


def leave(y_BLD: jax.Array) -> jax.Array:
    """What a layer's last product gives, as the residual stream lies; its gradient as the product reads it."""
    return _moved(y_BLD, _BETWEEN, _IN_LAYER)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, axes: tuple[str | None, ...], gradient_axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(x, *axes)


_moved.defvjp(
    lambda x, axes, gradient_axes: (constrain(x, *axes), None),
    lambda axes, gradient_axes, _, gradient: (constrain(gradient, *gradient_axes),),
)


def parts(axis: str | None) -> int:
    """Into how many parts the mesh divides an activation's logical axis."""
    names = compute_spec(axis)[0] if on_mesh() else None
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names or ()))


def in_use(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A stored parameter gathered for use; its gradient is asked for as the parameter is stored.

    Without the latter the gradient would be summed whole on every device, as a constraint holds for the gradient too.
    """
    return checkpoint_name(_gathered(x, axes), GATHERED) if on_mesh() else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, compute_spec(*axes))


def _forward(x: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return _gathered(x, axes), None


def _backward(axes: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored_spec(axes)),)


_gathered.defvjp(_forward, _backward)


def parameter_shardings(mesh: Mesh, logical_axes: Any) -> Any:
    """NamedShardings for a tree of logical-axis tuples."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, stored_spec(axes)), logical_axes, is_leaf=lambda x: isinstance(x, tuple)
    )
