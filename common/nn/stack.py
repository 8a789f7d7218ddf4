"""Layers stored stacked `[N, ...]`, run in one scan or unrolled."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.recipe import Execution
from common.nn.remat import entering, rematerialised

Layer = TypeVar("Layer", bound=nnx.Module)
Layers = TypeVar("Layers")
"""A stack, or a tuple of stacks that run side by side."""
Item = TypeVar("Item")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLayer(Generic[Item]):
    """One item a layer, in place of one whose arrays lead with the layers axis.

    What unrolled layers give back comes so, and parameters may come so: cutting a layer out of a stack, or putting it
    back, copies it.
    """

    items: tuple[Item, ...]


def stack(num_layers: int, make: Callable[[nnx.Rngs], Layer], rngs: nnx.Rngs) -> Layer:
    """`num_layers` layers as one module whose parameters lead with a "layers" axis, each initialised by its own key."""

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
) -> tuple[Any, Any]:
    """`body(layer, carry, x) -> (carry, y)` over a stack's layers.

    xs lead with the layers axis, or have PerLayer in place of arrays; so may the parameters. The returned ys are
    PerLayer where layers are unrolled, and lead with the layers axis where they are scanned.
    """
    graphdef, parameters = nnx.split(layers)

    def step(carry: Any, layer_and_x: tuple[Any, Any]) -> tuple[Any, Any]:
        layer_parameters, x = layer_and_x
        return body(nnx.merge(graphdef, layer_parameters), entering(carry), x)

    step = rematerialised(step, execution)
    if execution.scan_layers:
        return jax.lax.scan(step, carry, (parameters, xs))
    ys = []
    for layer_and_x in unstack((parameters, xs)):
        carry, y = step(carry, layer_and_x)
        ys.append(y)
    return carry, PerLayer(tuple(ys))


def per_layer(params: Any, logical_axes: Any, form: Callable[[jax.Array, tuple[str, ...]], Any]) -> Any:
    """Parameters whose stacked leaves are PerLayer: what a program that runs unrolled layers often should be given.

    `form` makes what is kept of one layer's array and the logical names of its dimensions.
    """

    def apart(x: jax.Array, axes: tuple[str, ...]) -> Any:
        return PerLayer(tuple(form(one, axes[1:]) for one in _unstack(x))) if axes[0] == "layers" else x

    return jax.tree.map(apart, params, logical_axes)


def unstack(tree: Any) -> list[Any]:
    """A list over the leading axis of all leaves, or over the items where leaves are PerLayer.

    The gradient is one `stack` a leaf, where plain indexing would pad and add N times.
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
