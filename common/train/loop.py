"""The training loop: one jitted step over the family's protocol, fed and recorded by the host.

While the device computes step t, the host records step t-1 and the loader builds later batches.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from common.allocator import release_freed_memory
from common.model import Skeleton
from common.sharding.hosts import barrier, is_first, on_first_process
from common.train.checkpoints import Checkpoints, Progress, describe_newest
from common.train.clock import WARM_UP
from common.train.preemption import Preempted, Preemption
from common.train.profile import Profile
from common.train.programs import check_rows, lower_step, make_programs
from common.train.recorder import Pending, Recorder, Rollback
from common.train.run import Launch, Start, check_same, check_validation, claim, note_launch, restore_or_begin
from common.train.run_files import RunFiles
from common.train.saving import Saving
from common.train.state import TrainState
from common.train.step import Metrics
from common.train.task import Task, Watcher
from common.train.watchdog import watched

Step = Callable[..., tuple[TrainState, Metrics]]
"""The compiled step; donates the state that it is called with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """A finished run."""

    model: Skeleton
    params: Any
    progress: Progress
    mesh: Mesh


def fit(task: Task, run_dir: Path, watcher: Watcher) -> Fitted:
    """Trains to the last step, from the newest good checkpoint in `run_dir` if there is one.

    Raises UserError if the directory is in use or belongs to another config, if storage refuses for too long, and if a
    loss or gradient is not finite, unless `train.anomalies` says otherwise (such a state never enters a checkpoint).
    After SIGTERM or SIGINT it finishes and saves the current step, then raises Preempted; if that takes too long it
    ends the process, as it does when the process hangs. With several processes, only the first one writes anything but
    checkpoints; if any of them receives SIGTERM, all end after the same step.
    """
    check_rows(task.setup)
    check_validation(task)
    began, patience, folder = time.time(), task.setup.train.patience, run_dir / RunFiles.CHECKPOINTS
    with (
        contextlib.ExitStack() as hold,
        watched(run_dir / RunFiles.stacks(jax.process_index()), patience.stall_seconds) as alive,
        contextlib.closing(Preemption(patience.preemption_seconds, lambda: describe_newest(folder))) as preemption,
    ):
        for warning in on_first_process(lambda: claim(task, run_dir, hold)):
            watcher.note(f"warning: {warning}")
        check_same(task, run_dir)
        programs = make_programs(task.setup)
        with (
            contextlib.closing(Checkpoints(folder, keep_last=task.setup.train.keep_last)) as checkpoints,
            jax.set_mesh(programs.mesh),
        ):
            run = Launch(
                task=task,
                folder=run_dir,
                watcher=watcher,
                programs=programs,
                checkpoints=checkpoints,
                preemption=preemption,
                alive=alive,
            )
            state, progress = _train_to_the_end(run, began)
        if preemption.requested():  # after the last step, which is saved
            raise Preempted(task.setup.steps, preemption.status)
        return Fitted(model=programs.model, params=state.params, progress=progress, mesh=programs.mesh)


def _train_to_the_end(run: Launch, began: float) -> tuple[TrainState, Progress]:
    """Starts or resumes, and starts again from a checkpoint after each rollback.

    `began`: Unix seconds at which this launch began.
    """
    start, setup = restore_or_begin(run), run.task.setup
    if start.progress.consumed_batches >= setup.steps:
        return start.state, start.progress
    first_launch = on_first_process(lambda: note_launch(run, began))
    # Compiled before the clock starts, so that compilation never counts as training.
    step_fn = lower_step(setup, run.programs, start.state).compile()
    while isinstance(trained := _train(run, step_fn, start, first_launch), Rollback):
        start = restore_or_begin(run)
    return trained


def _train(run: Launch, step_fn: Step, start: Start, first_launch: float) -> tuple[TrainState, Progress] | Rollback:
    """Trains from `start` to the last step, or until a step calls for a rollback."""
    setup, first = run.task.setup, start.progress.consumed_batches
    barrier()
    run.alive()
    run.watcher.begin(first, setup.steps)
    recorder = Recorder(run, start, first_launch)
    saving = Saving(run)
    profile = Profile(
        run.folder / RunFiles.PROFILE,
        first=first + 1 + WARM_UP,
        steps=run.task.profile_steps if is_first() else 0,
        note=run.watcher.note,
    )
    state, batches = start.state, run.task.stream.iterate(first, setup.steps)
    previous: Pending | None = None
    with contextlib.closing(recorder), contextlib.closing(profile):
        recorder.clock.restart()
        for step in range(first + 1, setup.steps + 1):
            # Dispatch step t, which returns before the device has computed it.
            profile.before(step, state)
            with recorder.clock.waiting_for_data():
                host = next(batches)
            limit, metrics = recorder.limit(step), None
            if step not in start.skip:
                numbers = recorder.numbers(limit, previous)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = step_fn(state, run.programs.put(host.batch), numbers)
            pending = Pending(counts=run.programs.count(host), metrics=metrics, limit=limit)

            # Record step t-1 meanwhile.
            if previous is not None and (rollback := recorder.record(previous)):
                return rollback
            previous = pending
            release_freed_memory(step - first)

            # Act on step t where it is due, which waits for the device.
            last, end = step == setup.steps, run.preemption.requested()
            validate = last or step % setup.train.validate_every == 0
            save = last or end or step % setup.train.checkpoint_every == 0 or saving.due()
            if validate or save:
                loss = _validation_loss(run, recorder, state.params) if validate else None
                if rollback := recorder.record(pending, loss):
                    return rollback
                previous = None
                if save:
                    _save(recorder, saving, state, loss, wait=last or end)
                if end:
                    raise Preempted(step, run.preemption.status)
                recorder.clock.restart()
    return state, recorder.progress


def _validation_loss(run: Launch, recorder: Recorder, params: Any) -> float:
    """Returns nats per weighted token over the fixed validation batches, summed on the host in float64."""
    jax.block_until_ready(params)
    with recorder.aside("eval"):
        sums = [run.programs.eval_step(params, run.programs.put(host.batch)) for host in run.task.validation]
        ce, weight = (math.fsum(float(pair[i]) for pair in sums) for i in (0, 1))
    return ce / weight


def _save(recorder: Recorder, saving: Saving, state: TrainState, validation_loss: float | None, *, wait: bool) -> None:
    """Saves the state after the last recorded step, and with `wait` returns only once it is written."""
    progress = recorder.stamp()
    with recorder.aside("checkpoint"):
        recorder.secure()
        saving.save(state, progress, validation_loss)
        if wait:
            saving.finish(state, progress, validation_loss)
