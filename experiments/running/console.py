"""What a run shows while it works: progress bars in a terminal, plain lines elsewhere."""

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from common.report.units import duration
from common.terminal import harmless, marked_up
from common.train.clock import shares

LINE_SECONDS = 30.0
SPEED_STEPS = 20
"""Steps that the speed is averaged over."""


class Harmless(logging.Formatter):
    """Formats messages that may name files and texts, without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


class Progress:
    """Bars on one console."""

    def __init__(self, console: Console):
        self.console = console

    def say(self, line: str) -> None:
        """Prints what is done next where no bar shows it, which is without a terminal."""
        if not self.console.is_terminal:
            self.console.print(marked_up(line), soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes how much was just done; without a terminal, it prints progress now and then."""
        done, last_line = 0, time.monotonic()
        with self._rich() as progress:
            task = progress.add_task(marked_up(title), total=total, detail="")

            def advance(more: int) -> None:
                nonlocal done, last_line
                done += more
                progress.advance(task, more)
                if time.monotonic() - last_line > LINE_SECONDS:
                    self.say(f"{title}: {done:,} of {total:,}")
                    last_line = time.monotonic()

            yield advance

    @contextlib.contextmanager
    def training(self, arm: str) -> Iterator["TrainingBar"]:
        with self._rich() as progress:
            yield TrainingBar(self.console, progress, arm)

    def _rich(self) -> RichProgress:
        return RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )


class TrainingBar:
    """A `common.train.task.Watcher`: a status line in a terminal, elsewhere a line every `LINE_SECONDS`."""

    def __init__(self, console: Console, progress: RichProgress, arm: str):
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
        """Loss, and speed over the last steps."""
        parts = [f"loss {row['loss']:.3f}" if "loss" in row else "left out"]
        seconds = sum(one for one, _ in self.recent)
        if seconds:
            parts.append(f"{sum(tokens for _, tokens in self.recent) / seconds:,.0f} tokens/s")
        if "mfu_causal_half" in timing:
            parts.append(f"MFU {timing['mfu_causal_half']:.1%} (causal half)")
        return "  ".join(parts)

    def _left(self, step: int) -> str:
        """The rest at the pace of this launch so far, validation and checkpoints too; and when it will be over."""
        done = step - self.first
        if done < 2 or step == self.steps:
            return ""
        left = (time.monotonic() - self.began) / done * (self.steps - step)
        return f"  {duration(left)} left, until {time.strftime('%H:%M', time.localtime(time.time() + left))}"


def describe_shares(timing: dict[str, Any]) -> str:
    """What the time went into, from a row of `timings.jsonl`.

    >>> describe_shares({"seconds": 80.0, "data_seconds": 10.0, "checkpoint_seconds": 5.0, "eval_seconds": 15.0})
    'time: 10.0% data, 70.0% compute, 5.0% checkpoint, 15.0% eval'
    """
    return "time: " + ", ".join(f"{share:.1%} {name}" for name, share in shares(timing).items())
