"""What a run shows while it works: progress bars in a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Bars on one console."""

    def __init__(self, console: Console):
        self.console = console

    @contextlib.contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Yields a function that takes how much has just been done."""
        with self._rich() as progress:
            task = progress.add_task(escape(title), total=total, detail="")
            yield lambda done: progress.advance(task, done)

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
    """A `common.train.loop.Watcher`."""

    def __init__(self, console: Console, progress: RichProgress, arm: str):
        self.console, self.progress, self.arm = console, progress, arm
        self.task = progress.add_task(f"training {escape(arm)}: compiling", total=None, detail="")

    def note(self, message: str) -> None:
        self.console.print(f"{escape(self.arm)}: {escape(message)}")

    def begin(self, step: int, steps: int) -> None:
        self.steps = steps
        self.progress.reset(
            self.task, total=steps, completed=step, description=f"training {escape(self.arm)}", detail=""
        )

    def step(self, row: dict[str, Any], train_seconds: float) -> None:
        speed = row["tokens"] / max(train_seconds, 1e-9)
        detail = f"loss {row['loss']:.3f}  {speed:,.0f} tokens/s"
        self.progress.update(self.task, completed=row["step"], detail=detail)
        if "validation_loss" in row:
            self.console.print(
                f"{escape(self.arm)}: step {row['step']}/{self.steps}  {detail}  "
                f"validation {row['validation_loss']:.4f}  {train_seconds:,.0f} s"
            )
