"""What the console shows of a run: progress bars in a terminal, plain lines elsewhere."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress

from common.progress import LINE_SECONDS, rich_bars
from common.report.units import duration
from common.terminal import harmless, marked_up
from common.train.clock import shares

SPEED_STEPS = 20
"""Average the speed over this many steps."""


class Harmless(logging.Formatter):
    """Formats log messages, escaping control characters that names of files and texts may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


@contextlib.contextmanager
def training_bar(console: Console, arm: str) -> Iterator["TrainingBar"]:
    """Shows a bar for the training of an arm and yields the observer that advances it."""
    with rich_bars(console) as progress:
        yield TrainingBar(console, progress, arm)


class TrainingBar:
    """A `common.train.task.Watcher` that updates a status line; without a terminal, it prints a line now and then."""

    def __init__(self, console: Console, progress: Progress, arm: str):
        self.console, self.progress, self.arm = console, progress, arm
        self.task = progress.add_task(f"training {marked_up(arm)}: compiling", total=None, detail="")

    def note(self, message: str) -> None:
        self.console.print(f"{marked_up(self.arm)}: {marked_up(message)}", soft_wrap=True)

    def begin(self, step: int, steps: int) -> None:
        self.steps, self.first, self.began = steps, step, time.monotonic()
        self.recent: deque[tuple[float, float]] = deque(maxlen=SPEED_STEPS)
        self.last_line = time.monotonic()
        self.progress.reset(
            self.task, total=steps, completed=step, description=f"training {marked_up(self.arm)}", detail=""
        )

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        if "tokens_per_second" in timing:
            self.recent.append((timing["step_seconds"], timing["tokens_per_second"] * timing["step_seconds"]))
        detail = self._detail(row, timing)
        self.progress.update(self.task, completed=row["step"], detail=marked_up(detail))
        line = f"{marked_up(self.arm)}: step {row['step']}/{self.steps}  {marked_up(detail + self._left(row['step']))}"
        silent = time.monotonic() - self.last_line > LINE_SECONDS and not self.console.is_terminal
        if "validation_loss" in row:
            line += f"  validation {row['validation_loss']:.4f}  {timing['seconds']:,.0f} s"
        if "validation_loss" in row or silent:
            self.console.print(line, soft_wrap=True)
            self.last_line = time.monotonic()
        if row["step"] == self.steps:
            self.note(f"{describe_shares(timing)}; goodput since the first launch {timing['goodput']:.0%}")

    def _detail(self, row: dict[str, Any], timing: dict[str, Any]) -> str:
        """Returns the loss, and the average speed of the last steps."""
        parts = [f"loss {row['loss']:.3f}" if "loss" in row else "skipped"]
        seconds = sum(step_seconds for step_seconds, _ in self.recent)
        if seconds:
            parts.append(f"{sum(tokens for _, tokens in self.recent) / seconds:,.0f} tokens/s")
        if "mfu_causal_half" in timing:
            parts.append(f"MFU {timing['mfu_causal_half']:.1%} (causal half)")
        return "  ".join(parts)

    def _left(self, step: int) -> str:
        """Returns the remaining time at the average pace of this launch, and the time of day at which it ends.

        The pace includes validation and checkpoints.
        """
        done = step - self.first
        if done < 2 or step == self.steps:
            return ""
        left = (time.monotonic() - self.began) / done * (self.steps - step)
        return f"  {duration(left)} left, until {time.strftime('%H:%M', time.localtime(time.time() + left))}"


def describe_shares(timing: dict[str, Any]) -> str:
    """Returns what the time was spent on, from a row of `timings.jsonl`.

    >>> describe_shares({"seconds": 80.0, "data_seconds": 10.0, "checkpoint_seconds": 5.0, "eval_seconds": 15.0})
    'time: 10.0% data, 70.0% compute, 5.0% checkpoint, 15.0% eval'
    """
    return "time: " + ", ".join(f"{share:.1%} {name}" for name, share in shares(timing).items())
