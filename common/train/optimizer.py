"""Makes schedules and optimizers from their configs, with optax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.nn.parametrization import is_matrix
from common.train.adafactor import make_adafactor
from common.train.config import WSD, Adafactor, AdamW, Constant, Cosine, InverseSqrt, Linear, Optimizer, Schedule


def make_schedule(schedule: Schedule, peak: float, steps: int) -> optax.Schedule:
    """Returns the learning rate at step 0, 1, ...; warm-up rises linearly from peak/(warmup+1), so step 0 learns too.

    For `InverseSqrt`, `peak` is the base, and the rate is flat during warm-up.

    >>> rate = make_schedule(Linear(warmup_steps=3), peak=1.0, steps=7)
    >>> [round(float(rate(step)), 3) for step in range(7)]
    [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = schedule.warmup_steps
    if isinstance(schedule, InverseSqrt):
        return lambda step: peak / jnp.sqrt(jnp.maximum(step, warmup).astype(jnp.float32))
    after = max(steps - warmup, 1)
    match schedule:
        case Linear():
            main = optax.linear_schedule(peak, peak * schedule.final_fraction, after)
        case Cosine():
            main = optax.cosine_decay_schedule(peak, after, alpha=schedule.final_fraction)
        case WSD():
            decay = min(max(1, round(steps * schedule.decay_fraction)), after)
            stable = after - decay
            main = optax.linear_schedule(peak, peak * schedule.final_fraction, decay, transition_begin=stable)
        case Constant():
            main = optax.linear_schedule(peak, peak, after)  # optax's constant returns one number for many steps
    if not warmup:
        return main
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, main], [warmup])


@functools.lru_cache(maxsize=4)
def learning_rates(schedule: Schedule, peak: float, steps: int) -> np.ndarray:
    """Returns the learning rates of a run's steps, float32 [steps].

    They are computed by one program in which `peak` and `steps` are constants, which rounds as a schedule within a
    training step does. Operation by operation, the last bit of some would differ.
    """
    with jax.numpy_dtype_promotion("standard"):  # optax takes integer step counts into float formulas
        return np.asarray(jax.jit(make_schedule(schedule, peak, steps))(np.arange(steps, dtype=np.int32)))


def make_optimizer(
    config: Optimizer, schedule: optax.Schedule, logical_axes: Any, scales: Any = None
) -> optax.GradientTransformation:
    """Returns the optimizer for parameters with these logical axes, from which it sees which are matrices.

    `scales` are those of `common.nn.parametrization.update_scales`, which only AdamW can follow.
    """
    match config:
        case AdamW():
            return _make_adamw(config, schedule, logical_axes, scales)
        case Adafactor():
            assert scales is None, "check_optimizer refuses this"
            return make_adafactor(config, schedule, logical_axes)


def _make_adamw(
    config: AdamW, schedule: optax.Schedule, logical_axes: Any, scales: Any
) -> optax.GradientTransformation:
    """Returns `optax.adamw` after clipping, with the same state, and with updates scaled parameter by parameter.

    Weight decay is added to scaled updates, so that it does not depend on their scale.
    """
    mask = jax.tree.map(is_matrix, logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    if scales is not None:
        clip = _times(clip, jax.tree.map(lambda scale: scale.gradient, scales))
        adam = _times(adam, jax.tree.map(lambda scale: scale.rate, scales))
    decay = optax.add_decayed_weights(config.weight_decay, mask)
    return optax.chain(clip, optax.chain(adam, decay, optax.scale_by_learning_rate(schedule)))


def _times(transformation: optax.GradientTransformation, factors: Any) -> optax.GradientTransformation:
    """Multiplies each parameter's update by its factor, a float."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = transformation.update(updates, state, params)
        return jax.tree.map(lambda factor, u: u if factor == 1.0 else u * factor, factors, updates), state

    return optax.GradientTransformation(transformation.init, update)
