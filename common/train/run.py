"""A task that is trained in a directory: how it is checked, and how its state is restored or initialised."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from common.config import difference
from common.errors import UserError
from common.files import write_json
from common.sharding.hosts import is_first, on_first_process, processes_where
from common.train import run_dir as rd
from common.train.checkpoints import Checkpoints, Progress
from common.train.init_from import load_parameters
from common.train.preemption import Preemption
from common.train.programs import Programs
from common.train.run_files import RunFiles
from common.train.state import TrainState, abstract_state, state_from_params
from common.train.task import Task, Watcher

SHARED_STORAGE_SECONDS = 60.0
"""How long to wait for another host's file to appear on shared storage."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """A task that this process trains: what stays the same, through rollbacks too."""

    task: Task
    folder: Path
    """The run directory."""
    watcher: Watcher
    programs: Programs
    checkpoints: Checkpoints
    preemption: Preemption
    alive: Callable[[], None]
    """Tells the watchdog that the run makes progress."""

    @property
    def storage_seconds(self) -> float:
        """How long to retry when storage refuses.

        Several processes do not retry: each would do so at another step than the others. One that fails ends them all,
        and the job is launched again.
        """
        return self.task.setup.train.patience.storage_seconds if jax.process_count() == 1 else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where training starts or resumes."""

    state: TrainState
    progress: Progress
    skip: frozenset[int]
    """Numbers of the batches, from 1, that earlier rollbacks skip."""


def check_validation(task: Task) -> None:
    """Raises UserError, in all processes, if the validation loss would be a mean over no tokens."""
    if not processes_where(any(np.any(host.batch.weights_BT) for host in task.validation)):
        raise UserError(
            "no token of the validation batches counts in the loss, so there is no validation loss: take more of them, "
            "or another data.source.validation_split"
        )


def claim(task: Task, run_dir: Path, hold: contextlib.ExitStack) -> list[str]:
    """Locks the directory until `hold` is closed, writes or checks its config, and returns warnings.

    Raises UserError as `run_dir.owned` and `run_dir.claim` do.
    """
    hold.enter_context(rd.owned(run_dir))
    return rd.claim(run_dir, task.config, task.data, task.tokenizer_files, task.complete_config)


def note_launch(run: Launch, began: float) -> float:
    """Records that this launch began at `began`; returns when the run's first launch did (Unix seconds)."""
    return rd.note_launch(run.folder, run.task.config, began, run.task.complete_config)


def check_same(task: Task, run_dir: Path) -> None:
    """Raises UserError, in all processes, if one of them was given another task or does not see the directory."""
    give_up = time.monotonic() + SHARED_STORAGE_SECONDS
    while not (run_dir / RunFiles.CONFIG).is_file() and time.monotonic() < give_up:
        time.sleep(0.1)
    if blind := processes_where(not (run_dir / RunFiles.CONFIG).is_file()):
        raise UserError(f"process {blind[0]} does not see {run_dir}: --run-dir must be one that all processes share")
    mine = task.config | task.data
    changes = difference(on_first_process(lambda: mine), mine)
    if others := processes_where(bool(changes)):
        how = f" ({'; '.join(map(str, changes))})" if changes else ""
        raise UserError(f"process {others[0]} was about to train something else{how}: start all with one command")


def restore_or_begin(run: Launch) -> Start:
    """Returns the state of the newest good checkpoint, or the initial state if there is none."""
    task, steps = run.task, run.task.setup.steps
    skip = frozenset(on_first_process(lambda: sorted(rd.rolled_back_batches(run.folder, steps))))
    restored = run.checkpoints.restore(
        abstract_state(run.programs.model, run.programs.optimizer, run.programs.shardings),
        seed=task.setup.train.seed,
        skipped=skip,
        patience_seconds=run.storage_seconds,
    )
    if restored is None:
        progress = Progress(consumed_batches=0, fingerprint=task.stream.content, source_fingerprint="")
        return Start(state=_initial_state(run), progress=progress, skip=skip)
    state, progress = restored
    if task.seeker is not None:
        task.seeker.recall(progress.landmarks)
    run.watcher.note(f"resuming after step {progress.consumed_batches} of {steps}")
    return Start(state=state, progress=progress, skip=skip)


def _initial_state(run: Launch) -> TrainState:
    """Returns the state before step 1; writes `init.json` if its parameters were loaded."""
    task, programs = run.task, run.programs
    seed = task.setup.train.seed
    if task.initial is None:
        return programs.init(np.uint32(seed))
    stored = task.initial.open()
    params, plan = load_parameters(
        stored, programs.model, programs.shardings.params, rules=task.initial.rules, seed=seed
    )
    run.watcher.note(f"begins as {stored.origin}: {plan}")
    if is_first():
        write_json(run.folder / RunFiles.INITIAL, {"origin": stored.origin, **dataclasses.asdict(plan)})
    return state_from_params(params, programs.optimizer, programs.shardings)
