"""The training loop: one jitted step over the family's protocol, fed and recorded by the host.

While the device computes step t, the host reads the metrics of step t-1 and the loader builds later batches.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common.data.batch import HostBatch
from common.data.loader import chain
from common.errors import UserError
from common.files import write_json
from common.model import Skeleton
from common.sharding.hosts import barrier, is_first, on_first_process, processes_where
from common.train import run_dir as rd
from common.train.anomalies import Judge, Verdict, last_learnt
from common.train.checkpoints import Checkpoints, Progress, last_good
from common.train.init_from import load_parameters
from common.train.preemption import Preempted, noticed
from common.train.profile import Profile
from common.train.programs import Counts, Programs, Setup, check_rows, lower_step, make_programs
from common.train.record import WARM_UP, Clock, MetricsLog
from common.train.run_files import RunFiles
from common.train.saving import Saving
from common.train.state import TrainState, abstract_state, init_state, state_of
from common.train.step import Metrics
from common.train.task import Task, Watcher
from common.train.watchdog import watched

SEEN_SECONDS = 60.0
"""In which a file that one machine has written is there for the others: network file systems take their time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """A finished run."""

    model: Skeleton
    params: Any
    progress: Progress
    mesh: Mesh


def fit(task: Task, run_dir: Path, watcher: Watcher) -> Fitted:
    """Trains to the end, from the newest good checkpoint of `run_dir` where there is one, else from the beginning.

    Raises UserError where the directory is in use or belongs to another config, where storage refuses for too long, and
    when a loss or gradient is not finite and nothing else was asked for (such a state never enters a checkpoint). On
    SIGTERM or SIGINT the step that runs is ended and saved, then Preempted is raised; where that takes too long the
    process is ended, and so it is where it hangs. With several processes only the first one writes, except for
    checkpoints; where any is sent SIGTERM, all end after the same step.
    """
    check_rows(task.setup)
    _check_validation(task)
    began, patience = time.time(), task.setup.train.patience
    stacks = run_dir / RunFiles.stacks(jax.process_index())
    with (
        contextlib.ExitStack() as hold,
        watched(stacks, patience.stall_seconds) as alive,
        noticed(patience.preemption_seconds, lambda: last_good(run_dir / RunFiles.CHECKPOINTS)) as asked_to_end,
    ):
        for warning in on_first_process(lambda: _claim(task, run_dir, hold)):
            watcher.note(f"warning: {warning}")
        _check_same(task, run_dir)
        programs = make_programs(task.setup)
        checkpoints = Checkpoints(run_dir / RunFiles.CHECKPOINTS, keep_last=task.setup.train.keep_last)
        with contextlib.closing(checkpoints), jax.set_mesh(programs.mesh):
            state, progress = _start(task, programs, checkpoints, run_dir, watcher)
            if progress.consumed_batches < task.setup.steps:
                first_launch = on_first_process(lambda: rd.launched(run_dir, task.config, began))
                run = _Run(task, programs, checkpoints, run_dir, watcher, alive, asked_to_end, first_launch)
                while (done := run.go(state, progress)) is None:  # rolled back
                    state, progress = _start(task, programs, checkpoints, run_dir, watcher)
                state, progress = done
        if asked_to_end():  # since the last step, which is saved
            raise Preempted(task.setup.steps)
        return Fitted(model=programs.model, params=state.params, progress=progress, mesh=programs.mesh)


def _check_validation(task: Task) -> None:
    """Raises UserError, in all processes, where no validation loss could be taken."""
    if not processes_where(any(np.any(host.batch.weights_BT) for host in task.validation)):
        raise UserError(
            "no token of the validation batches counts in the loss, so there is no validation loss: take more of them, "
            "or another data.source.validation_split"
        )


def _claim(task: Task, run_dir: Path, hold: contextlib.ExitStack) -> list[str]:
    """Holds the directory until `hold` is closed, and returns warnings."""
    hold.enter_context(rd.owned(run_dir))
    return rd.claim(run_dir, task.config, task.data, task.tokenizer_files)


def _check_same(task: Task, run_dir: Path) -> None:
    """Raises UserError, in all processes, where one of them is about to train something else."""
    give_up = time.monotonic() + SEEN_SECONDS
    while not (run_dir / RunFiles.CONFIG).is_file() and time.monotonic() < give_up:
        time.sleep(0.1)
    if blind := processes_where(not (run_dir / RunFiles.CONFIG).is_file()):
        raise UserError(f"process {blind[0]} does not see {run_dir}: --run-dir must be one that all processes share")
    moved = rd.changes(on_first_process(lambda: task.config | task.data), task.config | task.data)
    if others := processes_where(bool(moved)):
        how = f" ({'; '.join(moved)})" if moved else ""
        raise UserError(f"process {others[0]} was about to train something else{how}: start all with one command")


def _left_out(run_dir: Path, steps: int) -> frozenset[int]:
    return frozenset(on_first_process(lambda: sorted(rd.left_out(run_dir, steps))))


def _start(
    task: Task, programs: Programs, checkpoints: Checkpoints, run_dir: Path, watcher: Watcher
) -> tuple[TrainState, Progress]:
    abstract = abstract_state(programs.model, programs.optimizer, programs.shardings)
    restored = checkpoints.restore(
        abstract,
        seed=task.setup.train.seed,
        left_out=_left_out(run_dir, task.setup.steps),
        patience_seconds=_storage_seconds(task.setup),
    )
    if restored is not None:
        if task.seeker is not None:
            task.seeker.recall(restored[1].landmarks)
        watcher.note(f"resuming after step {restored[1].consumed_batches} of {task.setup.steps}")
        return restored
    return _begin(task, programs, run_dir, watcher), Progress(consumed_batches=0, fingerprint=task.stream.content)


def _begin(task: Task, programs: Programs, run_dir: Path, watcher: Watcher) -> TrainState:
    """The state before step 1, and in `init.json` what its parameters are where they are not fresh."""
    seed = task.setup.train.seed
    if task.initial is None:
        return init_state(programs.model, programs.optimizer, seed, programs.shardings)
    stored = task.initial.open()
    params, plan = load_parameters(
        stored, programs.model, programs.shardings.params, rules=task.initial.rules, seed=seed
    )
    watcher.note(f"begins as {stored.origin}: {plan}")
    if is_first():
        write_json(run_dir / RunFiles.INITIAL, {"origin": stored.origin, **dataclasses.asdict(plan)})
    return state_of(params, programs.optimizer, programs.shardings)


def _storage_seconds(setup: Setup) -> float:
    """Several processes would each try again at a step of its own: one that fails ends them, and they begin again."""
    return setup.train.patience.storage_seconds if jax.process_count() == 1 else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pending:
    """A batch whose step is recorded while the next one runs."""

    counts: Callable[[], Counts]
    """What its batch holds; waits for it."""
    metrics: Metrics | None
    """None: it was passed over."""
    limit: float
    """The loss above which it is a spike."""


class _RolledBack(Exception):
    """The state that the loop holds is given up."""


class _Run:
    """The loop, from a state to the last step."""

    def __init__(
        self,
        task: Task,
        programs: Programs,
        checkpoints: Checkpoints,
        run_dir: Path,
        watcher: Watcher,
        alive: Callable[[], None],
        asked_to_end: Callable[[], bool],
        first_launch: float,
    ):
        self.task, self.programs, self.checkpoints, self.run_dir = task, programs, checkpoints, run_dir
        self.watcher, self.alive, self.asked_to_end, self.first_launch = watcher, alive, asked_to_end, first_launch
        self.step_fn: Callable[..., tuple[TrainState, Metrics]] | None = None

    def go(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress] | None:
        """The last state; None where the run has to go on from another one, that of its newest checkpoint."""
        setup, first = self.task.setup, progress.consumed_batches
        # Compiled before the clock starts, so that compilation is never counted as training.
        self.step_fn = self.step_fn or lower_step(setup, self.programs, state).compile()
        barrier()
        self.alive()
        self.watcher.begin(first, setup.steps)
        self.left_out = _left_out(self.run_dir, setup.steps)
        self.judge = Judge(setup.train.anomalies, progress.losses)
        self.saving = Saving(
            self.checkpoints,
            seed=setup.train.seed,
            patience_seconds=_storage_seconds(setup),
            note=self.watcher.note,
        )
        self.rows = MetricsLog(
            setup,
            self.run_dir,
            progress,
            first_launch=self.first_launch,
            peak_flops_per_second=self.task.peak_flops_per_second,
            note=self.watcher.note,
            advice=lambda: (
                f"{self.checkpoints.last_good()}: mend the storage, then the same command goes on from there"
            ),
        )
        profile = Profile(
            self.run_dir / RunFiles.PROFILE,
            first=first + 1 + WARM_UP,
            steps=self.task.profile_steps if is_first() else 0,
            note=self.watcher.note,
        )
        with contextlib.closing(self.rows), contextlib.closing(profile):
            try:
                return self._steps(state, progress, profile)
            except _RolledBack:
                return None

    def _steps(self, state: TrainState, progress: Progress, profile: Profile) -> tuple[TrainState, Progress]:
        setup, first = self.task.setup, progress.consumed_batches
        batches = self.task.stream.iterate(first, setup.steps)
        self.clock = Clock(progress)
        pending: _Pending | None = None
        for step in range(first + 1, setup.steps + 1):
            profile.before(step, state)
            with self.clock.waiting_for_data():
                host = next(batches)
            limit, metrics = self.judge.limit(step), None
            if step not in self.left_out:
                state, metrics = self._dispatched(step, state, host, limit)
            counts = self.programs.count(host)
            if pending is not None:
                progress = self._record(progress, pending)
            pending = _Pending(counts=counts, metrics=metrics, limit=limit)
            validate = step % setup.train.validate_every == 0 or step == setup.steps
            ends = self.asked_to_end()
            save = step % setup.train.checkpoint_every == 0 or step == setup.steps or ends or self.saving.due()
            if validate or save:
                loss = self._validation_loss(state.params) if validate else None
                progress = self._record(progress, pending, loss)
                pending = None
                if save:
                    progress = self._save(state, progress, loss, wait=ends or step == setup.steps)
                if ends:
                    raise Preempted(step)
                self.clock.restart()
        return state, progress

    def _dispatched(self, step: int, state: TrainState, host: HostBatch, limit: float) -> tuple[TrainState, Metrics]:
        assert self.step_fn is not None
        guard = (np.float32(limit),) if self.task.setup.train.anomalies.guards_step else ()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            return self.step_fn(state, self.programs.put(host.batch), *guard)

    def _record(self, progress: Progress, pending: _Pending, validation_loss: float | None = None) -> Progress:
        """Waits for a step's metrics and writes its rows; returns what the run knows after it.

        Stops the run, or rolls it back, where they are an anomaly and that was asked for.
        """
        step, counts = progress.consumed_batches + 1, pending.counts()
        computed: dict[str, Any] = {"skipped": "rolled back", "skipped_batch": f"{counts.fingerprint:032x}"}
        learnt = False
        if pending.metrics is not None:
            loss, grad_norm = float(pending.metrics["loss"]), float(pending.metrics["grad_norm"])
            verdict = self.judge.verdict(loss, grad_norm, pending.limit)
            learnt = verdict is None
            if verdict is None:
                self.judge.learnt(step, loss)
                computed = {"loss": loss, "grad_norm": grad_norm}
            else:
                computed["skipped"] = f"loss {loss}, gradient norm {grad_norm}, limit {pending.limit}"
                self._judged(verdict, progress, step, computed)
        step_seconds = self.clock.lap()
        self.alive()
        progress = self._advanced(progress, counts) if learnt else self._passed_over(progress)
        row, timing = self.rows.write(
            progress, computed, validation_loss=validation_loss, step_seconds=step_seconds, clock=self.clock
        )
        self.watcher.step(row, timing)
        return progress

    def _judged(self, verdict: Verdict, progress: Progress, step: int, computed: dict[str, Any]) -> None:
        """Stops the run, rolls it back, or says that the batch is left out."""
        said = f"step {step}: {computed['skipped']}, batch {computed['skipped_batch']}"
        anomalies, first = self.task.setup.train.anomalies, step
        if verdict == "roll_back":
            self._saved()
            oldest = on_first_process(lambda: min(self.checkpoints.steps(), default=0))
            first = max(step - anomalies.rolled_back + 1, oldest + 1)
        in_a_row = step - last_learnt(progress.skipped, first - 1)
        if verdict == "stop" or in_a_row > anomalies.max_in_a_row:
            self._saved()
            many = f" (no step was learnt from in the last {in_a_row})" if in_a_row > 1 else ""
            raise UserError(f"{said}{many}; stopped, {self.checkpoints.last_good()}")
        if verdict == "roll_back":
            if is_first():
                rd.note_rollback(self.run_dir, {"step": step, "first": first, **computed})
            self.watcher.note(f"{said}; rolled back, batches {first} to {step} are left out")
            raise _RolledBack
        self.watcher.note(f"{said}; left out")

    def _saved(self) -> None:
        """Waits for the save that is under way; where it fails the checkpoint before it is the last good one."""
        with contextlib.suppress(Exception):
            self.checkpoints.wait()

    def _advanced(self, progress: Progress, counts: Counts) -> Progress:
        return dataclasses.replace(
            progress,
            consumed_batches=progress.consumed_batches + 1,
            fingerprint=chain(progress.fingerprint, counts.fingerprint),
            examples=progress.examples + counts.examples,
            tokens=progress.tokens + counts.length_sums.tokens,
            input_tokens=progress.input_tokens + counts.length_sums.inputs,
            loss_tokens=progress.loss_tokens + counts.loss_tokens,
            useful_flops=progress.useful_flops + self.task.setup.model.flops(counts.length_sums).train_full_attention,
        )

    def _passed_over(self, progress: Progress) -> Progress:
        step = progress.consumed_batches + 1
        return dataclasses.replace(progress, consumed_batches=step, skipped=(*progress.skipped, step))

    def _validation_loss(self, params: Any) -> float:
        """Nats a weighted token, over the fixed validation batches; the sum is taken on the host in float64."""
        jax.block_until_ready(params)
        with self.clock.aside("eval"):
            sums = [self.programs.eval_step(params, self.programs.put(host.batch)) for host in self.task.validation]
            ce, weight = (math.fsum(float(pair[i]) for pair in sums) for i in (0, 1))
        self.alive()
        return ce / weight

    def _save(self, state: TrainState, progress: Progress, validation_loss: float | None, *, wait: bool) -> Progress:
        seeker = self.task.seeker
        landmarks = () if seeker is None else seeker.landmarks(progress.consumed_batches)
        known = dataclasses.replace(progress, losses=self.judge.recent(), landmarks=landmarks)
        timed = self.clock.stamp(known)
        with self.clock.aside("checkpoint"):
            self.rows.secure()
            self.saving.save(state, timed, validation_loss)
            if wait:
                self.saving.finish(state, timed, validation_loss)
        self.alive()
        return timed
