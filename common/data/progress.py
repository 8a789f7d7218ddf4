"""What a terminal shows while data are made; nothing is shown elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, track

from common.terminal import marked_up

T = TypeVar("T")


def bar(items: Sequence[T], title: str) -> Iterable[T]:
    """The items, with a bar and the time left on standard error."""
    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    return track(items, description=marked_up(title), console=console, transient=True, disable=hidden)


def spinner(title: str) -> contextlib.AbstractContextManager[object]:
    """Around work whose end nobody can foresee."""
    return Console(stderr=True).status(marked_up(title)) if sys.stderr.isatty() else contextlib.nullcontext()


@contextlib.contextmanager
def counter(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left; call what it gives with the number of things that are done since the last call."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(marked_up(title), total=total)
        yield lambda done: progress.advance(task, done)
