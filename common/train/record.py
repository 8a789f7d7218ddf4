"""What a run writes down: a row a step of what was computed, and one of what it took."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.train import run_dir as rd
from common.train.checkpoints import Progress
from common.train.optimizer import make_schedule
from common.train.programs import Setup


@dataclasses.dataclass(kw_only=True)
class Clock:
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


class Rows:
    """`metrics.jsonl`, which is the same to the bit for any two runs of one config, and `timings.jsonl`."""

    def __init__(self, setup: Setup, run_dir: Path, progress: Progress):
        """Opens for appending after dropping the rows of steps after `progress`."""
        self.setup = setup
        schedule = make_schedule(setup.train.schedule, setup.learning_rate, setup.steps)
        with jax.numpy_dtype_promotion("standard"):  # optax takes integer step counts into float formulas
            self.learning_rates = np.asarray(schedule(np.arange(setup.steps)))
        self.flops_per_step = setup.flops_per_step()
        first = progress.consumed_batches
        self.metrics = rd.JsonLines(run_dir / rd.METRICS, keep_through_step=first)
        self.timings = rd.JsonLines(run_dir / rd.TIMINGS, keep_through_step=first)

    def write(
        self,
        progress: Progress,
        *,
        loss: float,
        grad_norm: float,
        validation_loss: float | None,
        clock: Clock,
        step_seconds: float,
    ) -> dict[str, Any]:
        """The rows of the step that ends with `progress`; returns that of metrics."""
        step = progress.consumed_batches
        rows, input_length, target_length = self.setup.row_slots
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
        timing = {
            "step": step,
            "seconds": clock.train_seconds,
            "step_seconds": step_seconds,
            "data_seconds": clock.data_seconds,
        }
        self.timings.write(timing)
        return row

    def close(self) -> None:
        self.metrics.close()
        self.timings.close()
