"""Adafactor with statistics by logical axes, each layer of a stacked parameter for itself.

Source: Shazeer & Stern 2018 (arXiv 1804.04235), in T5X's form: no momentum, decay 1 - (t + 1)^-0.8, factoring by named
axes. Optax's `adafactor` factors the two largest dimensions of a leaf and takes its root mean squares over all of it,
which mixes the layers of a stacked leaf, and heads with layers.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common.train.config import Adafactor

Role = Literal["layer", "row", "column"]
Axes = tuple[str, ...]

ROLES: dict[str, Role] = {
    "layers": "layer",
    "embed": "row",
    "vocab": "column",
    "mlp": "column",
    "heads": "column",
    "kv_heads": "column",
    "head_dim": "column",
}
"""T5X's standard factor rules; heads and head_dim are one axis there and are averaged over together here. A parameter
with any other axis keeps its statistics whole."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """Second moments of a matrix as means over its columns and over its rows; what is averaged away has size 1."""

    row: Any
    column: Any


class FactoredMoments(NamedTuple):
    """State: updates so far, and for each parameter its second moments, `Factored` or an array of its shape."""

    updates: jax.Array
    moments: Any


def make_adafactor(config: Adafactor, schedule: optax.Schedule, logical_axes: Any) -> optax.GradientTransformation:
    """Adafactor over a tree of parameters whose logical axes are known.

    An update is `rate * max(RMS(parameter), min_scale)` long at most (in root mean square, with `clip_update_rms` 1),
    both RMS taken of one layer's one matrix or vector.
    """
    steps = [
        _scale_by_moments(config, logical_axes),
        _each_layer(optax.clip_by_block_rms(config.clip_update_rms), logical_axes),
        _each_layer(optax.scale_by_param_block_rms(config.min_scale), logical_axes),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.clip_norm is not None:
        steps = [optax.clip_by_global_norm(config.clip_norm), *steps]
    return optax.chain(*steps)


def moment_axes(moment: Any, axes: Axes) -> Any:
    """Logical axes of a parameter's second moments, None where a dimension has been averaged away.

    >>> moment_axes(Factored(row=0, column=0), ("layers", "embed", "heads", "head_dim"))
    Factored(row=('layers', 'embed', None, None), column=('layers', None, 'heads', 'head_dim'))
    """
    if not isinstance(moment, Factored):
        return axes
    return Factored(
        row=tuple(None if ROLES[axis] == "column" else axis for axis in axes),
        column=tuple(None if ROLES[axis] == "row" else axis for axis in axes),
    )


def _dims(axes: Axes, role: Role) -> tuple[int, ...]:
    return tuple(i for i, axis in enumerate(axes) if ROLES.get(axis) == role)


def _is_factored(axes: Axes, shape: tuple[int, ...], least: int) -> bool:
    """Whether all axes have roles and there are at least so many rows and so many columns."""
    sizes = [math.prod(shape[i] for i in _dims(axes, role)) if _dims(axes, role) else 0 for role in ("row", "column")]
    return all(axis in ROLES for axis in axes) and min(sizes) >= least


def _map(function: Any, logical_axes: Any, *trees: Any) -> Any:
    """Over parameters; `function` gets a parameter's axes first."""
    return jax.tree.map(function, logical_axes, *trees, is_leaf=lambda x: isinstance(x, tuple))


def _scale_by_moments(config: Adafactor, logical_axes: Any) -> optax.GradientTransformation:
    """Divides gradients by the root of their (factored) second moments."""
    axes_by_path = dict(jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=lambda x: isinstance(x, tuple)))

    def zeros(path: Any, param: jax.Array) -> Any:
        axes = axes_by_path[path]
        if not _is_factored(axes, param.shape, config.min_factored):
            return jnp.zeros(param.shape, jnp.float32)
        kept = moment_axes(Factored(0, 0), axes)
        shapes = [
            tuple(1 if axis is None else n for axis, n in zip(of, param.shape, strict=True))
            for of in (kept.row, kept.column)
        ]
        return Factored(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    def init(params: Any) -> FactoredMoments:
        # By path, since optax inspects a state by making one of a placeholder.
        return FactoredMoments(updates=jnp.int32(0), moments=jax.tree.map_with_path(zeros, params))

    def update(grads: Any, state: FactoredMoments, params: Any = None) -> tuple[Any, FactoredMoments]:
        decay = 1.0 - (state.updates.astype(jnp.float32) + 1.0) ** -config.decay_exponent

        def advance(axes: Axes, grad: jax.Array, old: Any) -> Any:
            square = jnp.square(grad) + config.epsilon
            new: Any = square
            if isinstance(old, Factored):
                means = (square.mean(_dims(axes, averaged), keepdims=True) for averaged in ("column", "row"))
                new = Factored(*means)
            return jax.tree.map(lambda a, b: decay * a + (1.0 - decay) * b, old, new)

        moments = _map(advance, logical_axes, grads, state.moments)
        scaled = _map(_divided, logical_axes, grads, moments)
        return scaled, FactoredMoments(updates=optax.safe_increment(state.updates), moments=moments)

    return optax.GradientTransformation(init, update)


def _divided(axes: Axes, grad: jax.Array, moment: Any) -> jax.Array:
    if not isinstance(moment, Factored):
        return grad * jax.lax.rsqrt(moment)
    mean = moment.row.mean(_dims(axes, "row"), keepdims=True)
    return grad * jax.lax.rsqrt(moment.row / mean) * jax.lax.rsqrt(moment.column)


def _each_layer(stateless: optax.GradientTransformation, logical_axes: Any) -> optax.GradientTransformation:
    """A transformation that works parameter by parameter, on each layer of a stacked one for itself."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def one(axes: Axes, update: jax.Array, param: jax.Array) -> jax.Array:
            def apply(u: jax.Array, p: jax.Array) -> jax.Array:
                return stateless.update(u, state, p)[0]

            return (jax.vmap(apply) if axes[0] == "layers" else apply)(update, param)

        return _map(one, logical_axes, updates, params), state

    return optax.GradientTransformation(stateless.init, update)
