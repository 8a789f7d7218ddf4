"""Schedules against closed forms, AdamW against NumPy."""

import math
from collections.abc import Callable

import jax
import numpy as np
import optax
import pytest

from common.errors import UserError
from common.nn.parametrization import UpdateScale
from common.train.config import WSD, AdamW, Constant, Cosine, InverseSqrt, Linear, Schedule
from common.train.optimizer import make_optimizer, make_schedule

PEAK, STEPS, WARMUP = 3e-3, 40, 7


def rising(step: int, warmup: int) -> float:
    """A straight line through PEAK / (warmup + 1) at step 0 and PEAK at step `warmup`."""
    return PEAK * (step + 1) / (warmup + 1)


def line(step: int, start: int, end: int, final: float) -> float:
    """From PEAK at `start` to `final` of it at `end`."""
    return PEAK * (1 + (final - 1) * (step - start) / (end - start))


def half_cosine(step: int, start: int, end: int, final: float) -> float:
    angle = math.pi * (step - start) / (end - start)
    return PEAK * (final + (1 - final) * (1 + math.cos(angle)) / 2)


def wsd(step: int, decay: int, final: float) -> float:
    return PEAK if step <= STEPS - decay else line(step, STEPS - decay, STEPS, final)


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize(
    ("schedule", "after"),
    [
        (Linear, lambda step, warmup: line(step, warmup, STEPS, 0.0)),
        (lambda **k: Linear(final_fraction=0.25, **k), lambda step, warmup: line(step, warmup, STEPS, 0.25)),
        (Cosine, lambda step, warmup: half_cosine(step, warmup, STEPS, 0.1)),
        (lambda **k: Cosine(final_fraction=0.0, **k), lambda step, warmup: half_cosine(step, warmup, STEPS, 0.0)),
        (WSD, lambda step, warmup: wsd(step, 8, 0.0)),
        (lambda **k: WSD(decay_fraction=0.5, final_fraction=0.2, **k), lambda step, warmup: wsd(step, 20, 0.2)),
        (Constant, lambda step, warmup: PEAK),
    ],
    ids=["linear", "linear-final", "cosine", "cosine-final", "wsd", "wsd-half", "constant"],
)
def test_schedules(schedule: Callable[..., Schedule], after: Callable[[int, int], float], warmup: int) -> None:
    with jax.numpy_dtype_promotion("standard"):  # as the step and the loop do
        found = np.asarray(make_schedule(schedule(warmup_steps=warmup), PEAK, STEPS)(np.arange(STEPS)))
    expected = [rising(step, warmup) if step < warmup else after(step, warmup) for step in range(STEPS)]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)
    assert found[0] > 0 and found.max() == pytest.approx(PEAK)


@pytest.mark.parametrize("schedule", [Linear, Cosine, WSD])
@pytest.mark.parametrize("warmup", [0, 35])
def test_schedules_end_where_they_say(schedule: Callable[..., Schedule], warmup: int) -> None:
    """They end right after the last step, even if the warm-up leaves too few steps for the decay."""
    end = make_schedule(schedule(warmup_steps=warmup, final_fraction=0.25), PEAK, STEPS)
    with jax.numpy_dtype_promotion("standard"):
        assert float(end(STEPS)) == pytest.approx(PEAK / 4)
        assert PEAK / 4 < float(end(STEPS - 1)) < float(end(STEPS - 2)), "the last step is still on its way"


def test_t5s_schedule() -> None:
    """1 / sqrt(max(step, 10,000)): flat, no rise, then falling by the square root of the step (T5X)."""
    schedule = make_schedule(InverseSqrt(), 1.0, 1 << 19)
    steps = [0, 1, 9_999, 10_000, 10_001, 40_000, 524_287]
    with jax.numpy_dtype_promotion("standard"):
        found = np.asarray(schedule(np.array(steps)))
        assert float(jax.jit(schedule)(40_000)) == pytest.approx(0.005, rel=1e-6)
    np.testing.assert_allclose(found, [1 / math.sqrt(max(step, 10_000)) for step in steps], rtol=1e-6)
    assert found[0] == found[3] == pytest.approx(0.01)


def test_a_schedule_that_divides_by_zero_is_refused() -> None:
    with pytest.raises(UserError, match="warmup_steps is 0"):
        InverseSqrt(warmup_steps=0)


AXES = {
    "table": ("vocab", "embed"),
    "query": ("layers", "embed", "heads", "head_dim"),
    "query_bias": ("layers", "heads", "head_dim"),
    "stacked_norm": ("layers", "embed"),
    "norm": ("embed",),
}
SHAPES = {"table": (5, 4), "query": (3, 4, 2, 2), "query_bias": (3, 2, 2), "stacked_norm": (3, 4), "norm": (4,)}
DECAYED = {"table", "query"}


def draw(rng: np.random.Generator, scale: float) -> dict[str, np.ndarray]:
    return {name: scale * rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


SCALES = {
    "table": UpdateScale(rate=1.0, gradient=4.0),
    "query": UpdateScale(rate=0.25, gradient=12.0),
    "query_bias": UpdateScale(rate=1.0, gradient=12.0),
    "stacked_norm": UpdateScale(rate=1.0, gradient=12.0),
    "norm": UpdateScale(rate=1.0, gradient=4.0),
}


@pytest.mark.parametrize("scales", [None, SCALES], ids=["", "scaled"])
@pytest.mark.parametrize("clip_norm", [0.5, 100.0, None])
def test_adamw_is_numpys(clip_norm: float | None, scales: dict[str, UpdateScale] | None) -> None:
    """Three steps: clipping by the norm over all leaves, bias-corrected moments, weight decay outside of them.

    With scales, each parameter has its own epsilon and, for the moments' part of its update, its own rate.
    """
    config = AdamW(b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.3, clip_norm=clip_norm)
    schedule = make_schedule(Linear(warmup_steps=1), 0.1, 5)
    optimizer = make_optimizer(config, schedule, AXES, scales)
    rng = np.random.default_rng(0)
    params = draw(rng, 1.0)
    expected = {name: p.astype(np.float64) for name, p in params.items()}
    first = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    second = {name: np.zeros(shape) for name, shape in SHAPES.items()}

    @jax.jit
    def update(grads, state, params):
        with jax.numpy_dtype_promotion("standard"):  # as the step and the loop do
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    # By hand: warm-up from half the peak, then down from the peak by a quarter of it a step.
    for number, (rate, size) in enumerate([(0.05, 1.0), (0.1, 0.01), (0.075, 1.0)], start=1):
        grads = draw(rng, size)
        params, state = update(grads, state, params)
        norm = math.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, (math.inf if clip_norm is None else clip_norm) / norm)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            scale = UpdateScale(rate=1.0, gradient=1.0) if scales is None else scales[name]
            root = np.sqrt(second[name] / (1 - 0.9**number)) + 1e-3 / scale.gradient
            direction = scale.rate * (first[name] / (1 - 0.8**number)) / root
            decay = 0.3 * expected[name] if name in DECAYED else 0.0
            expected[name] = expected[name] - rate * (direction + decay)
    for name, p in expected.items():
        np.testing.assert_allclose(params[name], p, rtol=2e-5, atol=2e-6, err_msg=name)
