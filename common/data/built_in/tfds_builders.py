"""What the built-in TFDS builders share: they are made with one bar and no other noise.

This module imports tensorflow_datasets: import it where it is used.
"""

import contextlib
import io
import itertools
import logging
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import Progress

TICKS_PER_UPDATE = 100


@contextlib.contextmanager
def one_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on standard error that moves with every call of what is given; `total` calls fill it.

    TFDS prints what it prepares, warns of configs made on the spot and draws bars of its own: that is kept quiet.
    """
    with Progress(console=Console(stderr=True), transient=True) as progress, _quiet_tfds():
        task, ticks = progress.add_task(title, total=total), itertools.count(1)

        def tick() -> None:
            if (done := next(ticks)) % TICKS_PER_UPDATE == 0:
                progress.update(task, completed=done)

        yield tick


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.display_progress_bar(enable=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tfds.display_progress_bar(enable=True)
