"""The training step: loss, gradient, update.

Legend: A micro-batches, B batch rows, T target slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from common.data.batch import Batch
from common.model import Skeleton
from common.nn.loss import cross_entropy
from common.recipe import Execution
from common.sharding.rules import constrain
from common.train.state import TrainState

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Guard:
    """What a step needs that may be skipped. Scalars."""

    limit: Any
    """float32; the step is skipped if its loss is above it."""
    updates: Any
    """int32; how often the state has been updated, unless the step before was skipped: the host may not know yet."""
    rate_after_skip: Any
    """float32; the learning rate if the step before was skipped."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
    """Numbers that are arguments of the step, so that runs that differ only in them share one program. Scalars."""

    seed: Any
    """uint32; dropout's key is folded from it and the number of updates."""
    learning_rate: Any
    """float32"""
    guard: Guard | None = None
    """None for a step that is not guarded."""


def make_train_step(
    model: Skeleton,
    optimizer: Callable[[Any], optax.GradientTransformation],
    *,
    execution: Execution,
    z_loss: float,
    accumulation: int,
    guarded: bool = False,
) -> Callable[[TrainState, Batch, Numbers], tuple[TrainState, Metrics]]:
    """Returns a pure function `(state, batch, numbers) -> (state, metrics)`, to be jitted.

    `optimizer` makes the optimizer for a learning rate. The loss is the sum over weighted target tokens divided by the
    weight of the whole batch, however many micro-batches compute it. Metrics (float32 scalars): `loss` (cross-entropy
    per weighted token, in nats) and `grad_norm` (before clipping). With `guarded` the function returns the state
    unchanged if the loss is above the limit of `numbers.guard` or a metric is not finite.
    """

    def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        total, ce, weight = weighted_loss(model, params, batch, execution, z_loss, key)
        return total, (ce, weight)

    gradient = jax.grad(loss, has_aux=True)

    def accumulate(carry: Any, batch_and_key: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        params, sums = carry
        return (params, jax.tree.map(jnp.add, sums, gradient(params, *batch_and_key))), None

    def train_step(state: TrainState, batch: Batch, numbers: Numbers) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(numbers.seed), state.step)
        if accumulation == 1:
            grads, (ce, weight) = gradient(state.params, batch, key)
        else:
            zeros = (jax.tree.map(jnp.zeros_like, state.params), (jnp.float32(0), jnp.float32(0)))
            parts = (_micro_batches(batch, accumulation), jax.random.split(key, accumulation))
            (_, (grads, (ce, weight))), _ = jax.lax.scan(accumulate, (state.params, zeros), parts)
        scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax takes integer step counts into float formulas
            updates, opt_state = optimizer(numbers.learning_rate).update(grads, state.opt_state, state.params)
        advanced = TrainState(
            step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
        return advanced, {"loss": ce * scale, "grad_norm": optax.tree.norm(grads)}

    def guarded_step(state: TrainState, batch: Batch, numbers: Numbers) -> tuple[TrainState, Metrics]:
        guard = numbers.guard
        assert guard is not None
        rate = jnp.where(state.step < guard.updates, guard.rate_after_skip, numbers.learning_rate)
        advanced, metrics = train_step(state, batch, dataclasses.replace(numbers, learning_rate=rate))
        loss, grad_norm = metrics["loss"], metrics["grad_norm"]
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (loss <= guard.limit)
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), advanced, state), metrics

    return _with_precision(guarded_step if guarded else train_step, execution)


def make_eval_step(model: Skeleton, *, execution: Execution) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Returns a pure function `(params, batch) -> (sum of cross-entropy, sum of weights)`; no dropout, no z-loss."""

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        _, ce, weight = weighted_loss(model, params, batch, execution, 0.0, None)
        return ce, weight

    return _with_precision(eval_step, execution)


def weighted_loss(
    model: Skeleton, params: Any, batch: Batch, execution: Execution, z_loss: float, dropout_key: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns sums over a batch: weighted cross-entropy + z-loss, weighted cross-entropy, weights.

    Gradients flow through the first.
    """
    batch = jax.tree.map(lambda x: constrain(x, "batch", "length"), batch)
    merged = model.merge(params)
    total, ce = cross_entropy(
        merged.hidden(batch, dropout_key),
        merged.head(),
        batch.targets_BT,
        batch.weights_BT,
        z_loss,
        execution.loss_chunk,
        not execution.scan_layers,
    )
    return total, ce, batch.weights_BT.sum()


def _micro_batches(batch: Batch, count: int) -> Batch:
    """Reshapes [B, ...] to [A, B/A, ...].

    Row b goes to micro-batch b % A, so that each device keeps its rows and none are exchanged.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _with_precision(function: Callable[..., Any], execution: Execution) -> Callable[..., Any]:
    """Wraps `function` so that it is traced with the configured matmul precision."""
    if execution.matmul_precision == "default":
        return function

    def precise(*args: Any) -> Any:
        with jax.default_matmul_precision(execution.matmul_precision):
            return function(*args)

    return precise
