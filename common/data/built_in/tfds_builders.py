"""Shows one progress bar while a built-in TFDS builder prepares its data, and no other output.

This module imports tensorflow_datasets, which is slow: import it inside the function that uses it.
"""

import contextlib
import io
import itertools
import logging
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds

from common.progress import counter

TICKS_PER_UPDATE = 100


@contextlib.contextmanager
def one_bar(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Draws a progress bar on standard error and yields a callback that advances it; `total` calls fill it.

    Silences TFDS, which prints what it prepares, warns about new configs and draws its own bars.
    """
    with counter(title, total) as advance, _quiet_tfds():
        ticks = itertools.count(1)

        def tick() -> None:
            if next(ticks) % TICKS_PER_UPDATE == 0:
                advance(TICKS_PER_UPDATE)

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
