"""Training state: created directly sharded, or described abstractly for checkpoints and ahead-of-time compilation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import UserError
from common.model import Skeleton
from common.sharding.rules import parameter_shardings
from common.train.adafactor import Factored, moment_axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Arrays; or their shardings or shapes, in a tree of the same structure."""

    step: Any
    """Steps applied, int32 scalar."""
    params: Any
    """Nested dict of float32 arrays; the parameters of layers are stacked along a first axis."""
    opt_state: Any
    """Optax's state."""


def init_state(
    model: Skeleton, optimizer: optax.GradientTransformation, seed: int, shardings: TrainState
) -> TrainState:
    """Returns a fresh state; every array is created with its sharding."""
    return make_init(model, optimizer, shardings)(np.uint32(seed))


def make_init(
    model: Skeleton, optimizer: optax.GradientTransformation, shardings: TrainState
) -> Callable[[Any], TrainState]:
    """Returns a jitted function of a seed (uint32 scalar) that returns a fresh state."""

    def make(seed: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(nnx.state(model.build(nnx.Rngs(params=jax.random.key(seed)))))
        return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))

    return jax.jit(make, out_shardings=shardings)


def state_from_params(params: Any, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns the state at step 0 for existing parameters."""
    step = jax.device_put(jnp.int32(0), shardings.step)
    return TrainState(
        step=step, params=params, opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    )


def state_shardings(model: Skeleton, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the shardings of the whole state.

    Optimizer moments are sharded as their parameters are, factored ones along the axes that they keep; scalars are
    replicated. Raises UserError if a dimension does not divide by the devices along its mesh axis.
    """
    params = check_divides(model, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, axes: parameter_shardings(mesh, moment_axes(moment, axes)),
        jax.eval_shape(optimizer.init, model.shapes),
        model.logical_axes,
        transform_non_params=lambda _: replicated,
        is_leaf=lambda x: isinstance(x, Factored),
    )
    return TrainState(step=replicated, params=params, opt_state=opt_state)


def abstract_state(model: Skeleton, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns the state's shapes, dtypes and shardings, to restore into or to compile ahead of time."""
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=model.shapes,
        opt_state=jax.eval_shape(optimizer.init, model.shapes),
    )
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def check_divides(model: Skeleton, mesh: Mesh) -> Any:
    """Returns the shardings of the parameters.

    Raises UserError if a dimension does not divide by the devices along its mesh axis.
    """
    shardings = parameter_shardings(mesh, model.logical_axes)
    jax.tree.map_with_path(_check_divides, model.shapes, shardings)
    return shardings


def _check_divides(path: Any, shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> None:
    for size, axis in zip(shape.shape, sharding.spec, strict=True):
        parts = 1 if axis is None else sharding.mesh.shape[axis]
        if size % parts:
            fitting = max(n for n in range(1, parts + 1) if size % n == 0)
            raise UserError(
                f"train.mesh.{axis} is {parts}, which does not divide {jax.tree_util.keystr(path)} "
                f"of shape {shape.shape}; nearest: {axis}={fitting}"
            )
