"""The training loop: one jitted step over the family's protocol, fed and recorded by the host.

While the device computes step t, the host reads the metrics of step t-1 and the loader builds later batches.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.compute.moments import Moments
from common.data.batch import Batch, HostBatch
from common.data.loader import chain
from common.errors import UserError
from common.files import write_json
from common.model import Model, ModelConfig
from common.sharding.mesh import make_mesh
from common.sharding.shape import ROW_AXES
from common.train import run_dir as rd
from common.train.checkpoints import Checkpoints, Progress
from common.train.config import Rule, TrainConfig
from common.train.init_from import load_parameters
from common.train.optimizer import make_optimizer, make_schedule
from common.train.preemption import Preempted, noticed
from common.train.state import Skeleton, TrainState, abstract_state, init_state, skeleton, state_of, state_shardings
from common.train.step import Metrics, make_eval_step, make_train_step
from common.train.stored import Stored


class Stream(Protocol):
    """Batches by number; `common.data.loader.Loader` is one."""

    @property
    def content(self) -> str: ...

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What trains, and for how long; enough to compile the step."""

    build: Callable[[nnx.Rngs], Model]
    model: ModelConfig
    train: TrainConfig
    learning_rate: float
    """Peak, or what the schedule takes in its place."""
    steps: int
    row_slots: tuple[int, int, int]
    """Rows, input slots and target slots of a batch, over all hosts."""

    def flops_per_step(self) -> int:
        """Training FLOPs, full attention, padding included."""
        return self.model.flops(Moments.of_rows(*self.row_slots)).train_full_attention


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled step and what it needs."""

    mesh: Mesh
    model: Skeleton
    optimizer: Any
    shardings: TrainState
    batch_sharding: NamedSharding
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped

    def put(self, batch: Batch) -> Batch:
        """This host's rows onto its devices."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.batch_sharding, x), batch)


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


def check_rows(setup: Setup) -> None:
    """Raises UserError where a batch's rows do not divide over devices and micro-batches."""
    mesh, accumulation, rows = setup.train.mesh, setup.train.accumulation, setup.row_slots[0]
    parts = mesh.row_parts * accumulation
    if rows % parts:
        raise UserError(
            f"data.rows is {rows}, which does not divide by replica x data x fsdp x accumulation "
            f"({mesh.replica} x {mesh.data} x {mesh.fsdp} x {accumulation}); "
            f"nearest: {max(1, round(rows / parts)) * parts}"
        )


def prepare(setup: Setup, devices: Sequence[jax.Device] | None = None) -> Programs:
    """Mesh, shardings and jitted functions, for this machine's devices or for others; nothing is computed yet."""
    train = setup.train
    mesh = make_mesh(train.mesh, devices)
    model = skeleton(setup.build)
    schedule = make_schedule(train.schedule, setup.learning_rate, setup.steps)
    optimizer = make_optimizer(train.optimizer, schedule, model.logical_axes)
    shardings = state_shardings(model, optimizer, mesh)
    step = make_train_step(
        model,
        optimizer,
        execution=train.execution,
        z_loss=setup.model.recipe.z_loss,
        accumulation=train.accumulation,
        seed=train.seed,
    )
    return Programs(
        mesh=mesh,
        model=model,
        optimizer=optimizer,
        shardings=shardings,
        batch_sharding=NamedSharding(mesh, PartitionSpec(ROW_AXES, "context")),
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        eval_step=jax.jit(make_eval_step(model, execution=train.execution)),
    )


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


@dataclasses.dataclass(kw_only=True)
class _Clock:
    """Seconds spent on steps: compilation, validation and checkpoints are left out."""

    train_seconds: float
    data_seconds: float
    """Part of it that was spent waiting for a batch."""
    _last: float = 0.0

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Ends a step's time and begins the next one's."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.train_seconds += seconds
        return seconds

    def skip(self, seconds: float) -> None:
        """Takes time out of the running lap."""
        self._last += seconds


class _Run:
    """One pass of the loop."""

    def __init__(self, task: Task, programs: Programs, checkpoints: Checkpoints, run_dir: Path, watcher: Watcher):
        self.task, self.programs, self.checkpoints, self.watcher = task, programs, checkpoints, watcher
        self.run_dir = run_dir
        setup = task.setup
        schedule = make_schedule(setup.train.schedule, setup.learning_rate, setup.steps)
        with jax.numpy_dtype_promotion("standard"):  # optax takes integer step counts into float formulas
            self.learning_rates = np.asarray(schedule(np.arange(setup.steps)))
        self.flops_per_step = setup.flops_per_step()

    def go(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        setup = self.task.setup
        first = progress.consumed_batches
        # Compiled before the clock starts, so that compilation is never counted as training.
        step_fn = self._compiled(state)
        self.watcher.begin(first, setup.steps)
        self.metrics = rd.JsonLines(self.run_dir / rd.METRICS, keep_through_step=first)
        self.timings = rd.JsonLines(self.run_dir / rd.TIMINGS, keep_through_step=first)
        self.clock = _Clock(train_seconds=progress.train_seconds, data_seconds=progress.data_seconds)
        batches = self.task.stream.iterate(first, setup.steps)
        # Several processes would each stop at a step of its own: SIGTERM ends them, and they go back to a checkpoint.
        listening = noticed() if jax.process_count() == 1 else contextlib.nullcontext(lambda: False)
        with contextlib.closing(self.metrics), contextlib.closing(self.timings), listening as asked_to_end:
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
        rows, input_length, target_length = self.task.setup.row_slots
        row = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": float(self.learning_rates[step - 1]),
            "examples": progress.examples,
            "tokens": progress.tokens,
            "slots": step * rows * (input_length + target_length),
            "loss_tokens": progress.loss_tokens,
            "flops": step * self.flops_per_step,
            "fingerprint": progress.fingerprint,
        }
        if validation_loss is not None:
            row["validation_loss"] = validation_loss
        self.metrics.write(row)
        seconds = self.clock.train_seconds
        timing = {
            "step": step,
            "seconds": seconds,
            "step_seconds": step_seconds,
            "data_seconds": self.clock.data_seconds,
        }
        self.timings.write(timing)
        self.watcher.step(row, seconds)

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


def abstract_batch(row_slots: tuple[int, int, int], sharding: NamedSharding) -> Batch:
    """Shapes and dtypes of a batch of `(rows, input slots, target slots)`."""
    rows, input_length, target_length = row_slots
    lengths = {"I": input_length, "T": target_length}

    def abstract(name: str) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if name == "weights_BT" else jnp.int32
        return jax.ShapeDtypeStruct((rows, lengths[name[-1]]), dtype, sharding=sharding)

    return Batch(**{field.name: abstract(field.name) for field in dataclasses.fields(Batch)})
