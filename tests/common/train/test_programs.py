"""Runs of one process that differ only in numbers share their programs, and each trains as it would alone."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import common.train.step
from common.train.checkpoints import Checkpoints, Progress
from common.train.config import WSD, Adafactor, AdamW, Anomalies, Budget, Constant, InverseSqrt, Linear, Optimizer
from common.train.loop import fit
from common.train.optimizer import learning_rates, make_optimizer, make_schedule
from common.train.programs import _make_programs, make_programs
from common.train.run_files import RunFiles
from common.train.state import abstract_state, init_state
from common.train.task import Task
from experiments.families import builder
from tests.common.train.runs import same_bits
from tests.tiny import RECIPE, Observer, jax_settings, setup, task, tiny, train_config

RATE = 1e-2
NUMBERS: dict[str, dict[str, Any]] = {
    "base": {},
    "seed": {"seed": 3},
    "schedule": {"schedule": WSD(warmup_steps=1)},
    "steps": {"budget": Budget(unit="steps", amount=5)},
    "watching": {"validate_every": 1, "checkpoint_every": 2, "keep_last": 1},
}
"""Changes of a training config that no program depends on."""


def member(family: str, rate: float = RATE, **train: Any) -> Task:
    """Returns a task whose model has dropout, so that its steps depend on the seed."""
    config, model = train_config(**train), tiny(family, dataclasses.replace(RECIPE, dropout=0.2))
    return dataclasses.replace(task(family, **train), setup=setup(model, config, rate))


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS.keys())
def test_runs_that_differ_in_numbers_share_programs(change: dict[str, Any]) -> None:
    assert make_programs(member("gpt", 3e-3, **change).setup) is make_programs(member("gpt").setup)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": AdamW(b2=0.9)},
        {"accumulation": 2},
        {"anomalies": Anomalies(on_nonfinite="skip")},
        {"execution": dataclasses.replace(train_config().execution, loss_chunk=32)},
        {"sharding": "sequence"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_runs_of_other_programs_do_not(change: dict[str, Any]) -> None:
    assert make_programs(member("gpt", **change).setup) is not make_programs(member("gpt").setup)


@pytest.mark.parametrize("family", ["gpt", pytest.param("t5like", marks=pytest.mark.slow)])
def test_a_second_run_traces_nothing_and_trains_as_alone(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed, rate, schedule and number of steps differ; models, losses and steps are traced in the first run only."""
    traced: list[str] = []
    loss = common.train.step.weighted_loss

    def counted(*args: Any) -> Any:
        traced.append("loss")
        return loss(*args)

    monkeypatch.setattr(common.train.step, "weighted_loss", counted)
    tasks = [member(family), member(family, 3e-2, seed=5, schedule=Linear(), budget=Budget(unit="steps", amount=6))]

    def build(rngs: Any) -> Any:
        traced.append("model")
        return builder(tasks[0].setup.model, tasks[0].setup.train.execution)(rngs)

    tasks = [dataclasses.replace(of, setup=dataclasses.replace(of.setup, build=build)) for of in tasks]
    shared, before = [], 0
    for number, of in enumerate(tasks):
        shared.append(fit(of, tmp_path / f"shared{number}", Observer()))
        assert traced if number == 0 else len(traced) == before
        before = len(traced)
    for number, of in enumerate(tasks):
        _make_programs.cache_clear()
        alone = fit(of, tmp_path / f"alone{number}", Observer())
        same_bits(alone.params, shared[number].params)
        found, expected = (tmp_path / f"{name}{number}" / RunFiles.METRICS for name in ("shared", "alone"))
        assert found.read_bytes() == expected.read_bytes()
    assert len(traced) == 3 * before
    assert any((a != b).any() for a, b in zip(*(jax.tree.leaves(run.params) for run in shared), strict=True))


@pytest.mark.parametrize(
    "schedule",
    [Linear(warmup_steps=3), WSD(warmup_steps=2), Constant(), InverseSqrt(warmup_steps=4)],
    ids=lambda s: s.kind,
)
def test_rates_are_those_of_a_schedule_within_a_step(schedule: Any) -> None:
    """To the bit, as programs of runs are compiled; `schedule` is compiled for one step, as optax would call it."""

    @jax.jit
    def rate(step: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return make_schedule(schedule, RATE, 40)(step)

    learning_rates.cache_clear()
    with jax_settings({"jax_disable_most_optimizations": False}):
        alone = [np.asarray(rate(np.int32(step))) for step in range(40)]
        np.testing.assert_array_equal(learning_rates(schedule, RATE, 40), alone)


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(min_factored=8)], ids=lambda optimizer: optimizer.kind)
def test_a_checkpoint_with_the_schedule_in_its_optimizer_is_restored(optimizer: Optimizer, tmp_path: Path) -> None:
    """Earlier runs compiled the schedule into optax's optimizer, whose state counts its steps."""
    made = make_programs(setup(tiny("gpt"), train_config(optimizer=optimizer)))
    schedule = optax.linear_schedule(1e-2, 0.0, 8)
    earlier = make_optimizer(optimizer, schedule, made.model.logical_axes)
    state = init_state(made.model, earlier, 4, made.shardings)
    state = dataclasses.replace(state, step=state.step + 3)
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.shape == ()]
    assert counts  # the schedule's, and the moments'
    with contextlib.closing(Checkpoints(tmp_path, keep_last=1)) as checkpoints:
        checkpoints.save(state, Progress(consumed_batches=3, fingerprint="0"), seed=4, validation_loss=None)
        checkpoints.wait()
        restored = checkpoints.restore(abstract_state(made.model, made.optimizer, made.shardings), seed=4)
    assert restored is not None
    assert jax.tree.structure(restored[0]) == jax.tree.structure(state)
    same_bits(restored[0], state)
