"""What a run writes down: a row a step of what was computed, and one of what it took."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from common.compute.length_sums import LengthSums
from common.errors import UserError
from common.files import read_rows
from common.sharding.hosts import is_first
from common.train.checkpoints import Progress
from common.train.optimizer import make_schedule
from common.train.programs import Setup
from common.train.rows import JsonLines
from common.train.run_files import RunFiles
from common.train.storage import patiently

WARM_UP = 2
"""Steps after a start that are not counted as speed: caches are cold, buffers and pages are new."""

Aside = Literal["checkpoint", "eval"]


class Clock:
    """Seconds since step 0 over all launches: of steps, of waiting for data in them, and of what was beside them.

    A step's time ends when its metrics have arrived on the host, which waits for the device; so it is never the time it
    takes to dispatch one. Waiting for data counts whether the device was busy meanwhile or not. Compilation is in none
    of them, and steps that were lost with a launch are not either.
    """

    def __init__(self, progress: Progress):
        self.train_seconds, self.data_seconds = progress.train_seconds, progress.data_seconds
        self._aside: dict[Aside, float] = {"checkpoint": progress.checkpoint_seconds, "eval": progress.eval_seconds}
        self.restart()

    @property
    def checkpoint_seconds(self) -> float:
        """In which saving held training up."""
        return self._aside["checkpoint"]

    @property
    def eval_seconds(self) -> float:
        return self._aside["eval"]

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Ends a step's time and begins the next one's."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.train_seconds += seconds
        return seconds

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Part of the running lap."""
        began = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - began

    @contextlib.contextmanager
    def aside(self, what: Aside) -> Iterator[None]:
        """Time that is taken out of the running lap."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._aside[what] += seconds
        self._last += seconds

    def stamp(self, progress: Progress) -> Progress:
        return dataclasses.replace(
            progress,
            train_seconds=self.train_seconds,
            data_seconds=self.data_seconds,
            checkpoint_seconds=self.checkpoint_seconds,
            eval_seconds=self.eval_seconds,
        )


def shares(timing: dict[str, Any]) -> dict[str, float]:
    """Of the time that a run has taken so far, from a row of `timings.jsonl`; they sum to 1.

    >>> shares({"seconds": 80.0, "data_seconds": 10.0, "checkpoint_seconds": 5.0, "eval_seconds": 15.0})
    {'data': 0.1, 'compute': 0.7, 'checkpoint': 0.05, 'eval': 0.15}
    """
    parts = {
        "data": timing["data_seconds"],
        "compute": timing["seconds"] - timing["data_seconds"],
        "checkpoint": timing["checkpoint_seconds"],
        "eval": timing["eval_seconds"],
    }
    total = sum(parts.values()) or 1.0
    return {name: seconds / total for name, seconds in parts.items()}


def utilisation(setup: Setup, step_seconds: float, peak_flops_per_second: float) -> dict[str, float]:
    """Of the devices' peak: MFU in two conventions, padding counted as computed, and HFU.

    MFU is what the model needs over what the devices could do (arXiv 2204.02311, appendix B), with every key of
    attention counted (`full_attention`, that paper's convention) or with its causal part at half. HFU counts what the
    devices did, recomputation included; `ForwardFlops.train_hardware` says by which rule.
    """
    flops = setup.model.flops(LengthSums.of_rows(*setup.row_slots))
    possible = step_seconds * peak_flops_per_second * setup.train.mesh.devices
    return {
        "mfu_full_attention": flops.train_full_attention / possible,
        "mfu_causal_half": flops.train_causal_half / possible,
        "hfu": flops.train_hardware(setup.train.execution) / possible,
    }


def memory() -> dict[str, int]:
    """Bytes on the fullest device of this process; empty where the backend does not tell."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    if not stats:
        return {}
    return {
        "hbm_bytes": max(found["bytes_in_use"] for found in stats),
        "hbm_peak_bytes": max(found["peak_bytes_in_use"] for found in stats),
    }


def last_losses(run_dir: Path, steps: int) -> tuple[float, float]:
    """The mean training loss over the last tenth of a run's `steps` steps, and its last validation loss.

    Raises UserError where `metrics.jsonl` does not hold them.
    """
    rows = read_rows(run_dir / RunFiles.METRICS)
    last = rows[-1] if rows else {}
    learnt = [row["loss"] for row in rows if "loss" in row][-max(1, steps // 10) :]
    if last.get("step") != steps or "validation_loss" not in last or not learnt:
        raise UserError(
            f"{run_dir / RunFiles.METRICS} lacks the row of the last step, {steps}: something else changed the file; "
            f"without {run_dir / RunFiles.CHECKPOINTS / str(steps)} the same command trains the last steps again"
        )
    return sum(learnt) / len(learnt), last["validation_loss"]


class MetricsLog:
    """`metrics.jsonl`, which is the same to the bit for any two runs of one config, and `timings.jsonl`.

    The first process alone has them.
    """

    def __init__(
        self,
        setup: Setup,
        run_dir: Path,
        progress: Progress,
        *,
        first_launch: float,
        peak_flops_per_second: float | None,
        note: Callable[[str], None],
        advice: Callable[[], str],
    ):
        """Opens for appending after dropping the rows of steps after `progress`.

        `first_launch`: Unix seconds of the first launch. `peak_flops_per_second`: of one device; None where it is
        not known.
        `advice`: what to do when the disk refuses for too long.
        """
        self.setup, self.first_launch, self.peak_flops_per_second = setup, first_launch, peak_flops_per_second
        self.note, self.advice = note, advice
        schedule = make_schedule(setup.train.schedule, setup.learning_rate, setup.steps)
        with jax.numpy_dtype_promotion("standard"):  # optax takes integer step counts into float formulas
            self.learning_rates = np.asarray(schedule(np.arange(setup.steps)))
        self.flops_per_step = setup.flops_per_step()
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
        """The rows, of metrics and of timings, of the step that ends with `progress`.

        `computed`: its loss and gradient norm, or what is said of a batch that was left out.
        """
        step = progress.consumed_batches
        rows, input_length, target_length = self.setup.row_slots
        row: dict[str, Any] = {"step": step, **computed}
        if "loss" in computed:
            row["learning_rate"] = float(self.learning_rates[step - 1 - len(progress.skipped)])
        row |= {
            "examples": progress.examples,
            "tokens": progress.tokens,
            "slots": step * rows * (input_length + target_length),
            "loss_tokens": progress.loss_tokens,
            "flops": step * self.flops_per_step,
            "fingerprint": progress.fingerprint,
        }
        if validation_loss is not None:
            row["validation_loss"] = validation_loss
        timing = self._timing(progress, step_seconds, clock)
        for file, content in zip(self.files, (row, timing), strict=False):
            try:
                file.write(content)
            except OSError:
                self._patiently(file.flush)
        return row, timing

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
            if self.peak_flops_per_second is not None:
                timing |= utilisation(self.setup, step_seconds, self.peak_flops_per_second)
        return timing

    def secure(self) -> None:
        """Returns once no end of the process or the machine can take the rows, to be called before a checkpoint."""
        for file in self.files:
            self._patiently(file.secure)

    def _patiently(self, action: Callable[[], Any]) -> Any:
        return patiently(
            action,
            "rows of metrics",
            patience_seconds=self.setup.train.patience.storage_seconds,
            note=self.note,
            advice=self.advice(),
        )

    def close(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):  # which has been told of, and ends the run
                file.close()
