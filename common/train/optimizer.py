"""Makes schedules and optimizers from their configs, with optax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def make_optimizer(config: Optimizer, schedule: optax.Schedule, logical_axes: Any) -> optax.GradientTransformation:
    """Returns the optimizer for parameters with these logical axes, from which it sees which are matrices."""
    match config:
        case AdamW():
            return _make_adamw(config, schedule, logical_axes)
        case Adafactor():
            return make_adafactor(config, schedule, logical_axes)


def _make_adamw(config: AdamW, schedule: optax.Schedule, logical_axes: Any) -> optax.GradientTransformation:
    def decays(axes: tuple[str, ...]) -> bool:
        return sum(axis not in ("layers", "head_dim") for axis in axes) >= 2  # a bias [heads, head_dim] is a vector

    mask = jax.tree.map(decays, logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule, b1=config.b1, b2=config.b2, eps=config.epsilon, weight_decay=config.weight_decay, mask=mask
        ),
    )
