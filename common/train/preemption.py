"""Being asked to end: SIGTERM, which schedulers send before they take a machine away."""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

STATUS = 128 + signal.SIGTERM
"""Exit status (143) of a process that SIGTERM ends."""
_calls = itertools.count()
"""Of several processes, in all runs: they agree on a call, and the numbers of steps begin anew with each run."""


class Preempted(SystemExit):
    """A run that was asked to end has been saved; the process ends with the status of a process that SIGTERM ends."""

    def __init__(self, step: int) -> None:
        super().__init__(STATUS)
        self.step = step


@contextlib.contextmanager
def noticed(grace_seconds: float, last_words: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM ends nothing at once; what is given tells whether it has come.

    The process is ended `grace_seconds` after it, whatever it is doing then, with `last_words` on standard error. Only
    the main thread can hear it; elsewhere nothing changes.

    Several processes ask once a step, all of them, and hear of it at the same step, whichever was sent the signal; from
    then on the time counts. JAX listens for it from their joining to their end, within and without.
    """
    if jax.process_count() > 1:
        with _noticed_together(grace_seconds, last_words) as come_to_any:
            yield come_to_any
        return
    come = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield come.is_set
        return
    # Python's handlers run between two instructions of the main thread, which may be waiting for a device; the pipe is
    # written to at once.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    over = threading.Event()

    def end_in_time() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGTERM and not over.wait(grace_seconds):
                _end(grace_seconds, last_words)

    thread = threading.Thread(target=end_in_time, name="preemption", daemon=True)
    before = signal.signal(signal.SIGTERM, lambda number, frame: come.set())
    before_pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread.start()
    try:
        yield come.is_set
    finally:
        over.set()
        signal.set_wakeup_fd(before_pipe)
        signal.signal(signal.SIGTERM, before)
        os.close(writing)
        thread.join()
        os.close(reading)


@contextlib.contextmanager
def _noticed_together(grace_seconds: float, last_words: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    timer = threading.Timer(grace_seconds, _end, (grace_seconds, last_words))
    timer.daemon = True

    def come() -> bool:
        reached = multihost_utils.reached_preemption_sync_point(next(_calls))
        if reached:
            timer.start()
        return reached

    try:
        yield come
    finally:
        timer.cancel()


def _end(grace_seconds: float, last_words: Callable[[], str]) -> NoReturn:
    print(f"\ntwinstack: asked to end {grace_seconds:g} s ago; {last_words()}", file=sys.stderr, flush=True)
    os._exit(STATUS)
