"""Writes two rows per step: what was computed (`metrics.jsonl`) and how long it took (`timings.jsonl`)."""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.compute.length_sums import LengthSums
from common.errors import UserError
from common.files import read_rows
from common.sharding.hosts import is_first
from common.train.checkpoints import Progress, describe_newest
from common.train.clock import WARM_UP, Clock
from common.train.json_lines import JsonLines
from common.train.optimizer import make_schedule
from common.train.programs import Setup
from common.train.run_files import RunFiles
from common.train.storage import patiently
from common.train.task import Task


class MetricsLog:
    """`metrics.jsonl`, which is the same to the bit for any two runs of one config, and `timings.jsonl`.

    Only the first process writes them.
    """

    def __init__(
        self, task: Task, run_dir: Path, progress: Progress, *, first_launch: float, note: Callable[[str], None]
    ):
        """Opens both files for appending, after dropping the rows of steps after `progress`.

        `first_launch`: Unix seconds at which the run's first launch began. `note`: prints a line for the user.
        """
        self.task, self.setup, self.first_launch, self.note = task, task.setup, first_launch, note
        self.checkpoints = run_dir / RunFiles.CHECKPOINTS
        schedule = make_schedule(self.setup.train.schedule, self.setup.learning_rate, self.setup.steps)
        with jax.numpy_dtype_promotion("standard"):  # optax takes integer step counts into float formulas
            self.learning_rates = np.asarray(schedule(np.arange(self.setup.steps)))
        self.flops_per_step = self.setup.flops_per_step()
        first = progress.consumed_batches
        self.files = [
            self._patiently(partial(JsonLines, run_dir / name, keep_through_step=first))
            for name in ((RunFiles.METRICS, RunFiles.TIMINGS) if is_first() else ())
        ]
        for file in self.files:
            if file.lost:
                note(
                    f"warning: {file.path} lacks the rows of {len(file.lost)} steps from {file.lost[0]} to "
                    f"{file.lost[-1]}: curves and means do without them"
                )
        self._tokens = progress.tokens
        self._written = 0

    def write(
        self,
        progress: Progress,
        computed: dict[str, Any],
        *,
        validation_loss: float | None,
        step_seconds: float,
        clock: Clock,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Writes and returns the rows, of metrics and of timings, of the step that ends with `progress`.

        `computed`: the step's loss and gradient norm, or why its batch was skipped.
        """
        row = self._metrics(progress, computed)
        if validation_loss is not None:
            row["validation_loss"] = validation_loss
        timing = self._timing(progress, step_seconds, clock)
        for file, content in zip(self.files, (row, timing), strict=False):
            try:
                file.write(content)
            except OSError:
                self._patiently(file.flush)
        return row, timing

    def _metrics(self, progress: Progress, computed: dict[str, Any]) -> dict[str, Any]:
        step = progress.consumed_batches
        rows, input_length, target_length = self.setup.row_slots
        row: dict[str, Any] = {"step": step, **computed}
        if "loss" in computed:
            row["learning_rate"] = float(self.learning_rates[step - 1 - len(progress.skipped)])
        return row | {
            "examples": progress.examples,
            "tokens": progress.tokens,
            "slots": step * rows * (input_length + target_length),
            "loss_tokens": progress.loss_tokens,
            "flops": step * self.flops_per_step,
            "fingerprint": progress.fingerprint,
            "source_fingerprint": progress.source_fingerprint,
        }

    def _timing(self, progress: Progress, step_seconds: float, clock: Clock) -> dict[str, Any]:
        tokens, self._tokens = progress.tokens - self._tokens, progress.tokens
        self._written += 1
        now = time.time()
        timing = {
            "step": progress.consumed_batches,
            "time": now,
            "seconds": clock.train_seconds,
            "step_seconds": step_seconds,
            "data_seconds": clock.data_seconds,
            "checkpoint_seconds": clock.checkpoint_seconds,
            "eval_seconds": clock.eval_seconds,
            "goodput": clock.train_seconds / max(now - self.first_launch, clock.train_seconds),
            **memory(),
        }
        if self._written > WARM_UP and tokens:
            timing["tokens_per_second"] = tokens / step_seconds
            if self.task.peak_flops_per_second is not None:
                timing |= utilisation(self.setup, step_seconds, self.task.peak_flops_per_second)
        return timing

    def secure(self) -> None:
        """Returns once the rows survive the end of the process or the machine; to be called before each checkpoint."""
        for file in self.files:
            self._patiently(file.secure)

    def _patiently(self, action: Callable[[], Any]) -> Any:
        return patiently(
            action,
            "rows of metrics",
            patience_seconds=self.setup.train.patience.storage_seconds,
            note=self.note,
            advice=f"{describe_newest(self.checkpoints)}: repair the storage, then repeat the command to resume there",
        )

    def close(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):  # already reported, and the reason why the run ends
                file.close()


def utilisation(setup: Setup, step_seconds: float, peak_flops_per_second: float) -> dict[str, float]:
    """Returns shares of the devices' peak: MFU by two conventions, with padding counted as computed, and HFU.

    MFU is what the model needs over what the devices could do (arXiv 2204.02311, appendix B). It counts every key of
    attention (`full_attention`, that paper's convention) or half of its causal part. HFU counts what the devices did,
    recomputation included, by the rule of `ForwardFlops.train_hardware`.
    """
    flops = setup.model.flops(LengthSums.of_rows(*setup.row_slots))
    possible = step_seconds * peak_flops_per_second * setup.train.mesh.devices
    return {
        "mfu_full_attention": flops.train_full_attention / possible,
        "mfu_causal_half": flops.train_causal_half / possible,
        "hfu": flops.train_hardware(setup.train.execution) / possible,
    }


def memory() -> dict[str, int]:
    """Returns the bytes on this process's fullest device; empty if the backend does not report them."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if not stats:
        return {}
    return {
        "hbm_bytes": max(found["bytes_in_use"] for found in stats),
        "hbm_peak_bytes": max(found["peak_bytes_in_use"] for found in stats),
    }


def last_losses(run_dir: Path, steps: int) -> tuple[float, float]:
    """Returns the mean training loss over the last tenth of a run's `steps` steps, and its last validation loss.

    Raises UserError if `metrics.jsonl` lacks them.
    """
    rows = read_rows(run_dir / RunFiles.METRICS)
    last = rows[-1] if rows else {}
    learnt = [row["loss"] for row in rows if "loss" in row][-max(1, steps // 10) :]
    if last.get("step") != steps or "validation_loss" not in last or not learnt:
        raise UserError(
            f"{run_dir / RunFiles.METRICS} lacks the row of the last step, {steps}: something else changed the file; "
            f"remove {run_dir / RunFiles.CHECKPOINTS / str(steps)} and repeat the command to train the last steps again"
        )
    return sum(learnt) / len(learnt), last["validation_loss"]
