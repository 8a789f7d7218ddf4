"""Records the steps of a run: judges each, advances the run's counts and writes its rows."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from common.data.loader import chain
from common.sharding.hosts import is_first, on_first_process
from common.train import run_dir as rd
from common.train.anomalies import Diverged, Judge, Verdict, last_learnt
from common.train.checkpoints import Progress, describe_newest
from common.train.clock import Aside, Clock
from common.train.metrics_log import MetricsLog
from common.train.optimizer import learning_rates
from common.train.programs import Counts
from common.train.run import Launch, Start
from common.train.step import Guard, Metrics, Numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pending:
    """A step that has been dispatched to the devices but not recorded."""

    counts: Callable[[], Counts]
    """Waits for the counts of its batch over all processes."""
    metrics: Metrics | None
    """None if its batch was skipped."""
    limit: float
    """A loss above it is a spike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollback:
    """The current state must be discarded and the last checkpoint from before batch `first` restored.

    Batches `first` to `last` are skipped from then on.
    """

    first: int
    last: int


class Recorder:
    """Owns what a run knows besides its state: progress, clock, recent losses and the files of rows."""

    def __init__(self, run: Launch, start: Start, first_launch: float):
        """`first_launch`: Unix seconds at which the run's first launch began."""
        self.progress = start.progress
        self.clock = Clock(start.progress)
        self._run = run
        setup = run.task.setup
        self._judge = Judge(setup.train.anomalies, start.progress.losses)
        self._rates = learning_rates(setup.train.schedule, setup.learning_rate, setup.steps)
        self._seed = run.programs.replicate(np.uint32(setup.train.seed))
        self._log = MetricsLog(run.task, run.folder, start.progress, first_launch=first_launch, note=run.watcher.note)

    def limit(self, step: int) -> float:
        """Returns the loss above which `step` is a spike; known before the loss of the step before it."""
        return self._judge.limit(step)

    def numbers(self, limit: float, pending: Pending | None) -> Numbers:
        """Returns what the next step takes, on the devices; `pending` is the step before it if not recorded yet."""
        updates = self.progress.consumed_batches - len(self.progress.skipped)
        guard, dispatched = None, pending is not None and pending.metrics is not None
        if self._run.task.setup.train.anomalies.guards_step:
            guard = Guard(
                limit=np.float32(limit),
                updates=np.int32(updates + dispatched),
                rate_after_skip=self._rates[updates],
            )
        numbers = Numbers(seed=self._seed, learning_rate=self._rates[updates + dispatched], guard=guard)
        return self._run.programs.replicate(numbers)

    def record(self, pending: Pending, validation_loss: float | None = None) -> Rollback | None:
        """Waits for the step after `progress`, judges it, advances `progress` and writes the step's rows.

        Returns a rollback, and records nothing, if the step calls for one. Raises Diverged if it must stop the run.
        """
        step, counts = self.progress.consumed_batches + 1, pending.counts()
        computed: dict[str, Any] = {"skipped": "rolled back", "skipped_batch": f"{counts.fingerprint:032x}"}
        learnt = False
        if pending.metrics is not None:
            loss, grad_norm = float(pending.metrics["loss"]), float(pending.metrics["grad_norm"])
            verdict = self._judge.verdict(loss, grad_norm, pending.limit)
            learnt = verdict is None
            if verdict is None:
                self._judge.learnt(step, loss)
                computed = {"loss": loss, "grad_norm": grad_norm}
            else:
                computed["skipped"] = f"loss {loss}, gradient norm {grad_norm}, limit {pending.limit}"
                if rollback := self._react(verdict, step, computed):
                    return rollback
        step_seconds = self.clock.lap()
        self._run.alive()
        self.progress = self._after_learning(counts) if learnt else self._after_skipping()
        row, timing = self._log.write(
            self.progress, computed, validation_loss=validation_loss, step_seconds=step_seconds, clock=self.clock
        )
        self._run.watcher.step(row, timing)
        return None

    def _react(self, verdict: Verdict, step: int, computed: dict[str, Any]) -> Rollback | None:
        """Returns a rollback, None if the batch of an anomalous step is skipped, or raises Diverged to stop."""
        anomalies, checkpoints, first = self._run.task.setup.train.anomalies, self._run.checkpoints, step
        message = f"step {step}: {computed['skipped']}, batch {computed['skipped_batch']}"
        if verdict == "roll_back":
            self._wait_for_save()
            oldest = on_first_process(lambda: min(checkpoints.steps(), default=0))
            first = max(step - anomalies.rolled_back + 1, oldest + 1)
        in_a_row = step - last_learnt(self.progress.skipped, first - 1)
        if verdict == "stop" or in_a_row > anomalies.max_in_a_row:
            self._wait_for_save()
            many = f" (no step was learnt from in the last {in_a_row})" if in_a_row > 1 else ""
            raise Diverged(f"{message}{many}; stopped, {describe_newest(checkpoints.folder)}")
        if verdict == "skip":
            self._run.watcher.note(f"{message}; skipped")
            return None
        if is_first():
            rd.note_rollback(self._run.folder, {"step": step, "first": first, **computed})
        self._run.watcher.note(f"{message}; rolled back, batches {first} to {step} are skipped")
        return Rollback(first=first, last=step)

    def _wait_for_save(self) -> None:
        """Waits for the save in progress; if it fails, the checkpoint before it stays the newest."""
        with contextlib.suppress(Exception):
            self._run.checkpoints.wait()

    def _after_learning(self, counts: Counts) -> Progress:
        before, flops = self.progress, self._run.task.setup.model.flops(counts.length_sums)
        source = before.source_fingerprint
        return dataclasses.replace(
            before,
            consumed_batches=before.consumed_batches + 1,
            fingerprint=chain(before.fingerprint, counts.fingerprint),
            source_fingerprint=None if source is None else chain(source, counts.source_fingerprint),
            examples=before.examples + counts.examples,
            tokens=before.tokens + counts.length_sums.tokens,
            input_tokens=before.input_tokens + counts.length_sums.inputs,
            loss_tokens=before.loss_tokens + counts.loss_tokens,
            useful_flops=before.useful_flops + flops.train_full_attention,
        )

    def _after_skipping(self) -> Progress:
        step = self.progress.consumed_batches + 1
        return dataclasses.replace(self.progress, consumed_batches=step, skipped=(*self.progress.skipped, step))

    @contextlib.contextmanager
    def aside(self, what: Aside) -> Iterator[None]:
        """Counts the time inside as `what`, not as training, and counts its end as a sign of life."""
        with self.clock.aside(what):
            yield
        self._run.alive()

    def stamp(self) -> Progress:
        """Adds to `progress` what only a checkpoint needs: seconds, recent losses, landmarks of the stream."""
        seeker = self._run.task.seeker
        landmarks = () if seeker is None else seeker.landmarks(self.progress.consumed_batches)
        known = dataclasses.replace(self.progress, losses=self._judge.recent(), landmarks=landmarks)
        self.progress = self.clock.stamp(known)
        return self.progress

    def secure(self) -> None:
        """Returns once the rows written so far survive the end of the process or the machine."""
        self._log.secure()

    def close(self) -> None:
        self._log.close()
