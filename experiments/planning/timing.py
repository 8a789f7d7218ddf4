"""Times a few training steps of a study's arms on this machine, and estimates the other arms by FLOPs.

Legend: B rows, I input slots, T target slots.
"""

import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.data.batch import Batch
from common.train.programs import Programs, Setup, make_programs
from common.train.step import Guard, Numbers
from experiments.run import Run
from experiments.running.pipeline import compiled_step, make_setup

MOST_MEASURED = 4
"""How many shapes are compiled and timed: the cheapest, the most expensive and some between them."""
STEPS = 5
"""Steps that are timed, after one that is not."""
LONG_ENOUGH_SECONDS = 10.0
"""No further step is timed once those before have taken this long."""
SLOWEST_STEP_SECONDS = 60.0
"""A step that would take longer, by those timed before, is not timed."""
MEMORY = Path("/proc/meminfo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The training step of one shape, compiled and timed on this machine."""

    flops: int
    arguments_bytes: int
    """State and batch on one device, as XLA plans them."""
    temporaries_bytes: int
    seconds: float | None
    """Median of the timed steps; None if it was not timed."""
    untimed: str = ""
    """Why it was not timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one training step."""

    seconds: float
    by_flops: bool
    """Whether they are estimated by FLOPs from another shape's step."""


def shape(run: Run) -> Hashable:
    """Returns a key that is equal for runs whose steps take equally long: only numbers and data differ."""
    train = run.train
    how = train.optimizer, train.accumulation, train.mesh, train.sharding, train.execution, train.anomalies.guards_step
    return run.model, run.row_slots, *how


def to_measure(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs to measure, in order of their FLOPs: all, or `MOST_MEASURED` evenly spread ones.

    `runs`: one of each shape.
    """
    ordered = sorted(runs, key=lambda run: run.flops_per_step)
    last, most = len(ordered) - 1, min(MOST_MEASURED, len(ordered))
    return [ordered[round(i * last / max(1, most - 1))] for i in range(most)]


def step_time(run: Run, measured: Mapping[Hashable, Measured]) -> StepTime | None:
    """Returns the time of a run's step: its shape's, else by FLOPs from the closest shape's; None if none is timed."""
    timed = {key: one for key, one in measured.items() if one.seconds is not None}
    if not timed:
        return None
    own, flops = timed.get(shape(run)), run.flops_per_step
    closest = own or min(timed.values(), key=lambda one: abs(math.log(one.flops / flops)))
    assert closest.seconds is not None
    seconds = closest.seconds if own else closest.seconds * flops / closest.flops
    return StepTime(seconds=seconds, by_flops=own is None)


def measure(run: Run, before: Mapping[Hashable, Measured]) -> Measured:
    """Compiles the step of a run and times it, unless it needs more memory than is free or would take too long.

    `before`: the shapes measured so far.
    """
    compiled = compiled_step(run)
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    expected = step_time(run, before)
    untimed, seconds = "", None
    if arguments + temporaries > (free := _free_bytes()):
        untimed = f"a step needs {(arguments + temporaries) / 2**30:.1f} GiB a device, and {free / 2**30:.1f} are free"
    elif expected is not None and expected.seconds > SLOWEST_STEP_SECONDS:
        untimed = "a step would take too long"
    else:
        seconds = _seconds(make_setup(run), compiled)
    return Measured(
        flops=run.flops_per_step,
        arguments_bytes=arguments,
        temporaries_bytes=temporaries,
        seconds=seconds,
        untimed=untimed,
    )


def _seconds(setup: Setup, step: Callable[..., Any]) -> float:
    """Returns the median time of a few steps on a random batch, after a first one; of that one if it takes long."""
    programs = make_programs(setup)
    rate = np.float32(setup.learning_rate)
    guard = Guard(limit=np.float32(np.inf), updates=np.int32(0), rate_after_skip=rate)
    numbers = Numbers(seed=np.uint32(0), learning_rate=rate, guard=guard if setup.train.anomalies.guards_step else None)
    with jax.set_mesh(programs.mesh):
        state, numbers = programs.init(np.uint32(0)), programs.replicate(numbers)
        batch = programs.put(_random_batch(setup, programs))
        took: list[float] = []
        while len(took) <= STEPS and sum(took) < LONG_ENOUGH_SECONDS:
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch, numbers))
            took.append(time.perf_counter() - begun)
    return statistics.median(took[1:] or took)


def _random_batch(setup: Setup, programs: Programs) -> Batch:
    """Returns rows of this process whose slots are all filled, each by one example of random tokens."""
    rng, rows = np.random.default_rng(0), len(programs.local_rows)
    _, inputs, targets = setup.row_slots

    def tokens(length: int) -> np.ndarray:
        return rng.integers(0, setup.model.vocab_size, (rows, length), dtype=np.int32)

    def positions(first: int, length: int) -> np.ndarray:
        return np.broadcast_to(np.arange(first, first + length, dtype=np.int32), (rows, length))

    return Batch(
        inputs_BI=tokens(inputs),
        input_segments_BI=np.ones((rows, inputs), np.int32),
        input_positions_BI=positions(0, inputs),
        decoder_inputs_BT=tokens(targets),
        targets_BT=tokens(targets),
        target_segments_BT=np.ones((rows, targets), np.int32),
        target_positions_BT=positions(inputs, targets),
        weights_BT=np.ones((rows, targets), np.float32),
    )


def _free_bytes() -> float:
    """Returns the free memory of one device; infinite where it is unknown."""
    if stats := jax.devices()[0].memory_stats():
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else math.inf
    if not MEMORY.is_file():
        return math.inf
    found = re.search(r"^MemAvailable: *(\d+) kB$", MEMORY.read_text(), re.MULTILINE)
    return math.inf if found is None else int(found[1]) * 1024 / len(jax.local_devices())
