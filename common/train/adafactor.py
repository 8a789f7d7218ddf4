"""Adafactor that factors by logical axes and treats each layer of a stacked parameter separately.

Source: Shazeer & Stern 2018 (arXiv 1804.04235), in T5X's form: no momentum, decay 1 - (t + 1)^-0.8, factoring by named
axes. Optax's `adafactor` factors the two largest dimensions of a leaf and takes its root mean squares over the whole
leaf, which mixes the layers of a stacked leaf, and heads with layers.
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
"""T5X's standard factor rules. Heads and head_dim are one axis there, and are averaged over together here. A parameter
with any other axis is not factored."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """Second moments of a matrix, as means over its columns and over its rows; averaged axes have size 1.

    For a matrix [rows, columns] stacked over layers: `row` [layers, rows, 1] and `column` [layers, 1, columns].
    """

    row: Any
    column: Any


class FactoredMoments(NamedTuple):
    """Optimizer state: updates so far, and each parameter's second moments, `Factored` or an array of its shape."""

    updates: jax.Array
    moments: Any


def make_adafactor(config: Adafactor, schedule: optax.Schedule, logical_axes: Any) -> optax.GradientTransformation:
    """Returns Adafactor for parameters with these logical axes.

    With `clip_update_rms` 1, the RMS of an update is at most `rate * max(RMS(parameter), min_scale)`. Both are root
    mean squares over one matrix or vector of one layer.
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
    """Returns the logical axes of a parameter's second moments, with None for an axis that is averaged over.

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
    """Returns whether all axes have roles and there are at least `least` rows and `least` columns."""
    sizes = [math.prod(shape[i] for i in _dims(axes, role)) if _dims(axes, role) else 0 for role in ("row", "column")]
    return all(axis in ROLES for axis in axes) and min(sizes) >= least


def _map_parameters(function: Any, logical_axes: Any, *trees: Any) -> Any:
    """Applies `function(axes, ...)` to each parameter's logical axes and its leaves of `trees`."""
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
            tuple(1 if axis is None else size for axis, size in zip(kept_axes, param.shape, strict=True))
            for kept_axes in (kept.row, kept.column)
        ]
        return Factored(*(jnp.zeros(shape, jnp.float32) for shape in shapes))

    def init(params: Any) -> FactoredMoments:
        # By path, since optax also calls this with a tree of placeholders, to inspect the state.
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

        moments = _map_parameters(advance, logical_axes, grads, state.moments)
        scaled = _map_parameters(_divide_by_root, logical_axes, grads, moments)
        return scaled, FactoredMoments(updates=optax.safe_increment(state.updates), moments=moments)

    return optax.GradientTransformation(init, update)


def _divide_by_root(axes: Axes, grad: jax.Array, moment: Any) -> jax.Array:
    if not isinstance(moment, Factored):
        return grad * jax.lax.rsqrt(moment)
    mean = moment.row.mean(_dims(axes, "row"), keepdims=True)
    return grad * jax.lax.rsqrt(moment.row / mean) * jax.lax.rsqrt(moment.column)


def _each_layer(stateless: optax.GradientTransformation, logical_axes: Any) -> optax.GradientTransformation:
    """Applies a stateless, per-parameter transformation to each layer of a stacked parameter separately."""

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        def transform(layer_update: jax.Array, layer_param: jax.Array) -> jax.Array:
            return stateless.update(layer_update, state, layer_param)[0]

        def each(axes: Axes, update: jax.Array, param: jax.Array) -> jax.Array:
            return (jax.vmap(transform) if axes[0] == "layers" else transform)(update, param)

        return _map_parameters(each, logical_axes, updates, params), state

    return optax.GradientTransformation(stateless.init, update)
