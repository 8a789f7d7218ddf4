"""Logical axis names, and the tables that map them to mesh axes: one for stored parameters, one for computation.

Stored parameters, their gradients and the optimizer's state are sharded over `fsdp` and `tensor`. Before a layer uses a
parameter, it is all-gathered along `fsdp` (ZeRO stage 3, arXiv 1910.02054); it stays sharded along `tensor` (Megatron,
arXiv 1909.08053). The two strategies differ in the residual stream between layers: replicated over `tensor` (`fsdp`),
or sharded over it along its length (`sequence`: sequence parallelism, arXiv 2205.05198).

Collectives are not called: arrays are constrained to the sharding before and after, and the compiler inserts them.

    operation                 strategy   forward          backward         along
    all_gather_parameter      both       all-gather       reduce-scatter   fsdp
    all_gather_residual       sequence   all-gather       reduce-scatter   tensor
                              fsdp       -                all-reduce       tensor
    reduce_scatter_residual   sequence   reduce-scatter   all-gather       tensor
                              fsdp       all-reduce       -                tensor
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
"""The mesh axes that shard one dimension; None: it is not sharded."""
Strategy = Literal["fsdp", "sequence"]
GATHERED = "gathered"
"""Checkpoint name of gathered parameters, for rematerialisation policies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Mesh axes by logical axis name."""

    parameters: Mapping[str, Axis]
    """For parameters, gradients and optimizer state between steps."""
    compute: Mapping[str, Axis]
    """For parameters in use, and activations."""


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
_COMPUTE: Mapping[str, Axis] = {
    **_STORED,
    "embed": None,
    "batch": ROW_AXES,
    "length": "context",
    "residual": "context",
}

STRATEGIES: Mapping[str, Rules] = {
    "fsdp": Rules(parameters=_STORED, compute=_COMPUTE),
    "sequence": Rules(parameters=_STORED, compute={**_COMPUTE, "residual": ("context", "tensor")}),
}

_strategy: contextvars.ContextVar[Strategy] = contextvars.ContextVar("sharding strategy", default="fsdp")


@contextlib.contextmanager
def strategy(name: Strategy) -> Iterator[None]:
    """Selects the rules for programs that are traced inside the block."""
    token = _strategy.set(name)
    try:
        yield
    finally:
        _strategy.reset(token)


def stored_spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Returns the mesh axes of a stored parameter from the logical names of its dimensions.

    >>> stored_spec(("layers", "embed", "mlp"))
    P(None, 'fsdp', 'tensor')
    """
    return _spec(STRATEGIES[_strategy.get()].parameters, axes)


def compute_spec(*axes: str | None) -> PartitionSpec:
    """Returns the mesh axes of an activation or a parameter in use; a dimension named None is not sharded.

    >>> compute_spec("embed", "mlp"), compute_spec("batch", "length", "heads", None)
    (P(None, 'tensor'), P(('replica', 'data', 'fsdp'), 'context', 'tensor', None))
    """
    return _spec(STRATEGIES[_strategy.get()].compute, axes)


def _spec(rules: Mapping[str, Axis], axes: tuple[str | None, ...]) -> PartitionSpec:
    return PartitionSpec(*(None if axis is None else rules[axis] for axis in axes))


def on_mesh() -> bool:
    """Whether the program being traced runs on several devices, and outside `shard_map`, so that the rules apply."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not mesh.manual_axes


def num_shards(axis: str | None) -> int:
    """Returns the number of shards into which the mesh splits an activation's logical axis; 1 without a mesh."""
    names = compute_spec(axis)[0] if on_mesh() else None
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in ((names,) if isinstance(names, str) else names or ()))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains an activation's sharding by logical axis names; returns `x` itself without a mesh.

    A dimension that its devices do not divide, such as a length of 1 while decoding, is not sharded.
    """
    if not on_mesh():
        return x
    dividing = (axis if size % num_shards(axis) == 0 else None for size, axis in zip(x.shape, axes, strict=True))
    return jax.lax.with_sharding_constraint(x, compute_spec(*dividing))


_IN_LAYER, _BETWEEN_LAYERS = ("batch", "length", None), ("batch", "residual", None)
"""Logical axes of the residual stream, [B, L, D]."""


def all_gather_residual(x_BLD: jax.Array) -> jax.Array:
    """Gathers the residual stream along its length, for a layer's first products; the gradient is reduce-scattered."""
    return _reshard(x_BLD, _IN_LAYER, _BETWEEN_LAYERS)


def reduce_scatter_residual(y_BLD: jax.Array) -> jax.Array:
    """Sums and scatters the result of a layer's last product along its length; the gradient is all-gathered."""
    return _reshard(y_BLD, _BETWEEN_LAYERS, _IN_LAYER)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _reshard(x: jax.Array, axes: tuple[str | None, ...], gradient_axes: tuple[str | None, ...]) -> jax.Array:
    """Constrains `x` to `axes`, and its gradient to `gradient_axes`; a plain constraint would use `axes` for both."""
    return constrain(x, *axes)


_reshard.defvjp(
    lambda x, axes, gradient_axes: (constrain(x, *axes), None),
    lambda axes, gradient_axes, _, gradient: (constrain(gradient, *gradient_axes),),
)


def all_gather_parameter(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Gathers a stored parameter for use; its gradient is reduce-scattered to the sharding of the stored parameter.

    A plain constraint would also apply to the gradient, and every device would hold the gradient's whole sum.
    """
    return checkpoint_name(_all_gather(x, axes), GATHERED) if on_mesh() else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, compute_spec(*axes))


def _forward(x: jax.Array, axes: tuple[str, ...]) -> tuple[jax.Array, None]:
    return _all_gather(x, axes), None


def _reduce_scatter(axes: tuple[str, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored_spec(axes)),)


_all_gather.defvjp(_forward, _reduce_scatter)


def parameter_shardings(mesh: Mesh, logical_axes: Any) -> Any:
    """Converts a tree of tuples of logical axis names to a tree of NamedShardings, as parameters are stored."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, stored_spec(axes)), logical_axes, is_leaf=lambda x: isinstance(x, tuple)
    )
