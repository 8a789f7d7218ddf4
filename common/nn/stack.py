"""Layers stored stacked, `[N, ...]`, and run in one scan or unrolled."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.remat import mark_input, rematerialised
from common.recipe import Execution

Layer = TypeVar("Layer", bound=nnx.Module)
Layers = TypeVar("Layers")
"""A stack, or a tuple of stacks that run in step."""
Item = TypeVar("Item")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLayer(Generic[Item]):
    """One item per layer, in place of a tree whose arrays have a leading layers axis.

    Unrolled layers return their outputs in this form, and accept parameters in it, because slicing a layer out of a
    stack, or stacking it again, copies it.
    """

    items: tuple[Item, ...]


def stack(num_layers: int, make: Callable[[nnx.Rngs], Layer], rngs: nnx.Rngs) -> Layer:
    """Makes `num_layers` layers, each with its own key, as one module whose parameters have a leading "layers" axis."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def make_all(rngs: nnx.Rngs) -> Layer:
        return make(rngs)

    return make_all(rngs)


def run_layers(
    layers: Layers,
    body: Callable[[Layers, Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    execution: Execution,
    last: Callable[[Layers, Any, Any], tuple[Any, Any]] | None = None,
) -> tuple[Any, Any]:
    """Runs `body(layer, carry, x) -> (carry, y)` over a stack's layers; returns the last carry and all ys.

    `xs` have a leading layers axis, or are PerLayer; so do the parameters. The returned ys are PerLayer if layers are
    unrolled, and have a leading layers axis if they are scanned.

    `last` replaces the body of the last layer, which then runs after the scan, and may return another form of carry.
    It can omit what nothing reads after the last layer; a scan computes it in every iteration.
    """
    graphdef, parameters = nnx.split(layers)

    def make_step(body: Callable[[Layers, Any, Any], tuple[Any, Any]], in_loop: bool) -> Callable[..., tuple[Any, Any]]:
        def step(carry: Any, layer_and_x: tuple[Any, Any]) -> tuple[Any, Any]:
            layer_parameters, x = layer_and_x
            return body(nnx.merge(graphdef, layer_parameters), mark_input(carry), x)

        return rematerialised(step, execution.remat, in_loop=in_loop)

    step = make_step(body, in_loop=execution.scan_layers)
    if execution.scan_layers and last is None:
        return jax.lax.scan(step, carry, (parameters, xs))
    last_step = step if last is None else make_step(last, in_loop=False)
    if execution.scan_layers:
        before, at_last = _without_last((parameters, xs))
        carry, ys = jax.lax.scan(step, carry, before)
        carry, y = last_step(carry, at_last)
        return carry, jax.tree.map(lambda ys, y: jnp.concatenate([ys, y[None]]), ys, y)
    items = []
    *layers_and_xs, at_last = unstack((parameters, xs))
    for layer_and_x in layers_and_xs:
        carry, y = step(carry, layer_and_x)
        items.append(y)
    carry, y = last_step(carry, at_last)
    return carry, PerLayer((*items, y))


def per_layer(params: Any, logical_axes: Any, form: Callable[[jax.Array, tuple[str, ...]], Any]) -> Any:
    """Converts stacked parameters to PerLayer, for programs that run unrolled layers many times.

    `form(array, axes)` converts the array of one layer, whose dimensions have the logical names `axes`.
    """

    def split(x: jax.Array, axes: tuple[str, ...]) -> Any:
        return PerLayer(tuple(form(one, axes[1:]) for one in _unstack(x))) if axes[0] == "layers" else x

    return jax.tree.map(split, params, logical_axes)


def unstack(tree: Any) -> list[Any]:
    """Splits a tree into a list of one tree per layer; leaves have a leading layers axis or are PerLayer.

    The gradient is one `stack` per leaf; that of plain indexing would be N padded arrays and their sum.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, PerLayer))
    pieces = [leaf.items if isinstance(leaf, PerLayer) else _unstack(leaf) for leaf in leaves]
    return [jax.tree.unflatten(treedef, layer) for layer in zip(*pieces, strict=True)]


@jax.custom_vjp
def _unstack(x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x[i] for i in range(x.shape[0]))


def _unstack_forward(x: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    return _unstack(x), None


def _unstack_backward(_: None, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    return (jnp.stack(gradients),)


_unstack.defvjp(_unstack_forward, _unstack_backward)


def _without_last(tree: Any) -> tuple[Any, Any]:
    """Splits off the last layer; the gradient is one `concatenate` per leaf."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = [_split_last(leaf) for leaf in leaves]
    before, last = ([pair[side] for pair in pairs] for side in (0, 1))
    return jax.tree.unflatten(treedef, before), jax.tree.unflatten(treedef, last)


@jax.custom_vjp
def _split_last(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x[:-1], x[-1]


def _split_last_forward(x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    return _split_last(x), None


def _split_last_backward(_: None, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    before, last = gradients
    return (jnp.concatenate([before, last[None]]),)


_split_last.defvjp(_split_last_forward, _split_last_backward)
