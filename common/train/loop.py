"""The training loop: one jitted step over the family's protocol, fed and recorded by the host.

While the device computes step t, the host reads the metrics of step t-1 and the loader builds later batches.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from common.data.batch import Batch, HostBatch
from common.data.loader import chain
from common.errors import UserError
from common.files import write_json
from common.train import run_dir as rd
from common.train.checkpoints import Checkpoints, Progress
from common.train.config import Rule
from common.train.init_from import load_parameters
from common.train.preemption import Preempted, noticed
from common.train.programs import Programs, Setup, abstract_batch, check_rows, prepare
from common.train.record import Clock, Rows
from common.train.state import Skeleton, TrainState, abstract_state, init_state, state_of
from common.train.step import Metrics
from common.train.stored import Stored


class Stream(Protocol):
    """Batches by number; `common.data.loader.Loader` is one."""

    @property
    def content(self) -> str: ...

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initial:
    """Where a new run's parameters come from."""

    open: Callable[[], Stored]
    """Called once, and only where the run has no checkpoint of its own."""
    rules: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A setup with its data."""

    setup: Setup
    stream: Stream
    validation: tuple[HostBatch, ...]
    config: dict[str, Any]
    """Resolved config of the run, as JSON: what a run directory is recognised by."""
    data: dict[str, str]
    """What is read: content id of the source, hash of the tokenizer."""
    initial: Initial | None = None
    """None: a fresh model."""


class Watcher(Protocol):
    """What a run tells whoever looks on."""

    def note(self, message: str) -> None: ...

    def begin(self, step: int, steps: int) -> None: ...

    def step(self, row: dict[str, Any], train_seconds: float) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """A finished run."""

    model: Skeleton
    params: Any
    progress: Progress
    mesh: Mesh


def fit(task: Task, run_dir: Path, watcher: Watcher) -> Fitted:
    """Trains to the end, from the newest good checkpoint of `run_dir` where there is one, else from the beginning.

    Raises UserError where the directory is in use or belongs to another config, and when a loss or gradient is not
    finite (such a state never enters a checkpoint). On SIGTERM the step that runs is ended and saved, then Preempted is
    raised.
    """
    check_rows(task.setup)
    with rd.owned(run_dir):
        for warning in rd.claim(run_dir, task.config, task.data):
            watcher.note(f"warning: {warning}")
        programs = prepare(task.setup)
        checkpoints = Checkpoints(run_dir / rd.CHECKPOINTS, keep_last=task.setup.train.keep_last)
        with contextlib.closing(checkpoints), jax.set_mesh(programs.mesh):
            state, progress = _start(task, programs, checkpoints, run_dir, watcher)
            if progress.consumed_batches < task.setup.steps:
                state, progress = _Run(task, programs, checkpoints, run_dir, watcher).go(state, progress)
        return Fitted(model=programs.model, params=state.params, progress=progress, mesh=programs.mesh)


def _start(
    task: Task, programs: Programs, checkpoints: Checkpoints, run_dir: Path, watcher: Watcher
) -> tuple[TrainState, Progress]:
    abstract = abstract_state(programs.model, programs.optimizer, programs.shardings)
    restored = checkpoints.restore(abstract, seed=task.setup.train.seed)
    if restored is not None:
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
    write_json(run_dir / rd.INITIAL, {"origin": stored.origin, **dataclasses.asdict(plan)})
    return state_of(params, programs.optimizer, programs.shardings)


class _Run:
    """One pass of the loop."""

    def __init__(self, task: Task, programs: Programs, checkpoints: Checkpoints, run_dir: Path, watcher: Watcher):
        self.task, self.programs, self.checkpoints, self.watcher = task, programs, checkpoints, watcher
        self.run_dir = run_dir

    def go(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        setup = self.task.setup
        first = progress.consumed_batches
        # Compiled before the clock starts, so that compilation is never counted as training.
        step_fn = self._compiled(state)
        self.watcher.begin(first, setup.steps)
        self.rows = Rows(setup, self.run_dir, progress)
        self.clock = Clock(train_seconds=progress.train_seconds, data_seconds=progress.data_seconds)
        batches = self.task.stream.iterate(first, setup.steps)
        # Several processes would each stop at a step of its own: SIGTERM ends them, and they go back to a checkpoint.
        listening = noticed() if jax.process_count() == 1 else contextlib.nullcontext(lambda: False)
        with contextlib.closing(self.rows), listening as asked_to_end:
            self.clock.restart()
            pending: tuple[Metrics, Progress] | None = None
            for step in range(first + 1, setup.steps + 1):
                asked = time.perf_counter()
                host = next(batches)
                self.clock.data_seconds += time.perf_counter() - asked
                state, metrics = step_fn(state, self.programs.put(host.batch))
                if pending is not None:
                    self._record(*pending)
                progress = self._advanced(progress, host)
                pending = metrics, progress
                validate = step % setup.train.validate_every == 0 or step == setup.steps
                ends = asked_to_end()
                save = step % setup.train.checkpoint_every == 0 or step == setup.steps or ends
                if validate or save:
                    loss = self._validation_loss(state.params) if validate else None
                    self._record(metrics, progress, loss)
                    pending = None
                    if save:
                        progress = self._save(state, progress, loss)
                    if ends:
                        raise Preempted(step)
                    self.clock.restart()
            if asked_to_end():  # during the last save
                raise Preempted(setup.steps)
        return state, progress

    def _compiled(self, state: TrainState) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        batch = abstract_batch(self.task.setup.row_slots, self.programs.batch_sharding)
        return self.programs.train_step.lower(state, batch).compile()

    def _advanced(self, progress: Progress, host: HostBatch) -> Progress:
        return dataclasses.replace(
            progress,
            consumed_batches=progress.consumed_batches + 1,
            fingerprint=chain(progress.fingerprint, host.fingerprint),
            examples=progress.examples + host.examples,
            tokens=progress.tokens + host.moments.tokens,
            input_tokens=progress.input_tokens + host.moments.inputs,
            loss_tokens=progress.loss_tokens + host.loss_tokens,
            useful_flops=progress.useful_flops + self.task.setup.model.flops(host.moments).train_full_attention,
        )

    def _record(self, metrics: Metrics, progress: Progress, validation_loss: float | None = None) -> None:
        """Waits for a step's metrics and writes its rows; stops the run where they are not finite."""
        step = progress.consumed_batches
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        step_seconds = self.clock.lap()
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            good = self.checkpoints.latest_step()
            last = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good}"
            raise UserError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; stopped, {last} in {self.checkpoints.folder}"
            )
        row = self.rows.write(
            progress,
            loss=loss,
            grad_norm=grad_norm,
            validation_loss=validation_loss,
            clock=self.clock,
            step_seconds=step_seconds,
        )
        self.watcher.step(row, self.clock.train_seconds)

    def _validation_loss(self, params: Any) -> float:
        """Nats a weighted token, over the fixed validation batches; the sum is taken on the host in float64."""
        jax.block_until_ready(params)
        paused = time.perf_counter()
        sums = [self.programs.eval_step(params, self.programs.put(host.batch)) for host in self.task.validation]
        ce, weight = (math.fsum(float(pair[i]) for pair in sums) for i in (0, 1))
        self.clock.skip(time.perf_counter() - paused)
        return ce / weight

    def _save(self, state: TrainState, progress: Progress, validation_loss: float | None) -> Progress:
        timed = dataclasses.replace(
            progress, train_seconds=self.clock.train_seconds, data_seconds=self.clock.data_seconds
        )
        self.checkpoints.save(state, timed, seed=self.task.setup.train.seed, validation_loss=validation_loss)
        return timed
