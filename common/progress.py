"""Progress bars: title, bar, count and time left. They appear only on a terminal and disappear when done.

Titles may come from data and file names; they are shown as plain text, never as markup.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.terminal import marked_up

LINE_SECONDS = 30.0
"""How often `ProgressBars` prints a line without a terminal."""

Item = TypeVar("Item")


def rich_bars(console: Console, *, auto_refresh: bool = True) -> Progress:
    """Returns rich's bars with our columns; `detail`, a field of every task, follows the count."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        auto_refresh=auto_refresh,
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def counter(title: str, total: int, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Shows a bar, on standard error by default; yields `advance`, to be called with how many more are done."""
    with rich_bars(console or Console(stderr=True)) as bars:
        task = bars.add_task(marked_up(title), total=total, detail="")
        yield lambda more: bars.advance(task, more)


def tracked(items: Collection[Item], title: str) -> Iterator[Item]:
    """Yields the items while a bar on standard error counts them."""
    with rich_bars(Console(stderr=True)) as bars:
        task = bars.add_task(marked_up(title), total=len(items), detail="")
        yield from bars.track(items, task_id=task)


def spinner(title: str) -> contextlib.AbstractContextManager[object]:
    """Shows a spinner on standard error, for work of unknown length."""
    console = Console(stderr=True)
    return console.status(marked_up(title)) if console.is_terminal else contextlib.nullcontext()


class ProgressBars:
    """Bars on one console; without a terminal, a plain line every `LINE_SECONDS`."""

    def __init__(self, console: Console):
        self.console = console

    def say(self, line: str) -> None:
        """Prints what begins now, but only without a terminal: on one, a bar shows it."""
        if not self.console.is_terminal:
            self.console.print(marked_up(line), soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """As `counter`, and with a line now and then where there is no terminal."""
        done, last_line = 0, time.monotonic()
        with counter(title, total, self.console) as show:

            def advance(more: int) -> None:
                nonlocal done, last_line
                done += more
                show(more)
                if time.monotonic() - last_line > LINE_SECONDS:
                    self.say(f"{title}: {done:,} of {total:,}")
                    last_line = time.monotonic()

            yield advance
