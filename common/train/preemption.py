"""Being asked to end: by SIGTERM, which schedulers send before they take a machine away, or by SIGINT, as Ctrl-C is."""

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
    """A run that was asked to end has been saved; the process ends with the status of one that the signal ends."""

    def __init__(self, step: int) -> None:
        super().__init__(STATUS)
        self.step = step


@contextlib.contextmanager
def noticed(grace_seconds: float, last_words: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM and SIGINT end nothing at once; the yielded function returns whether one has come.

    The process is ended `grace_seconds` after SIGTERM, and at once by a SIGINT that follows another signal, whatever it
    is doing then, with `last_words` on standard error. Only the main thread can hear them; elsewhere nothing changes.

    Several processes ask once a step, all of them, and hear of SIGTERM at the same step, whichever was sent it; from
    then on the time counts. JAX listens for it from their joining to their end, within and without. A SIGINT is passed
    on as SIGTERM.
    """
    together = jax.process_count() > 1
    if threading.current_thread() is not threading.main_thread():
        with (
            _noticed_together(grace_seconds, last_words) if together else contextlib.nullcontext(lambda: False) as come
        ):
            yield come
        return
    with _heard(grace_seconds, last_words, together) as asked:
        try:
            if together:
                with _noticed_together(grace_seconds, last_words) as come_to_any:
                    yield come_to_any
            else:
                yield lambda: bool(asked)
        except Preempted as stopped:
            stopped.code = 128 + (asked[0] if asked else signal.SIGTERM)
            raise


@contextlib.contextmanager
def _heard(grace_seconds: float, last_words: Callable[[], str], together: bool) -> Iterator[list[int]]:
    """The numbers of the signals received so far; with several processes only SIGINT, as JAX handles the others."""
    asked: list[int] = []
    # Python's handlers run between two instructions of the main thread, which may be waiting for a device; the pipe is
    # written to at once.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    timer = threading.Timer(grace_seconds, _end, (STATUS, f"asked to end {grace_seconds:g} s ago", last_words))
    timer.daemon = True

    def listen() -> None:
        heard: set[int] = set()
        while number := os.read(reading, 1):
            if number[0] == signal.SIGTERM and signal.SIGTERM not in heard:
                timer.start()
            elif number[0] == signal.SIGINT and heard & {signal.SIGINT, signal.SIGTERM}:
                _end(128 + signal.SIGINT, "ended at once", last_words)
            elif number[0] == signal.SIGINT:
                print("\ntwinstack: the step at hand is ended and saved; Ctrl-C again ends at once", file=sys.stderr)
                if together:
                    os.kill(os.getpid(), signal.SIGTERM)
            heard.add(number[0])

    numbers = [signal.SIGINT] if together else [signal.SIGINT, signal.SIGTERM]
    # A shell's background job ignores SIGINT, and goes on doing so.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    before_pipe = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in before:
        signal.signal(number, lambda number, frame: asked.append(number))
    thread = threading.Thread(target=listen, name="preemption", daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        timer.cancel()
        signal.set_wakeup_fd(before_pipe)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)
        thread.join()
        os.close(reading)


@contextlib.contextmanager
def _noticed_together(grace_seconds: float, last_words: Callable[[], str]) -> Iterator[Callable[[], bool]]:
    timer = threading.Timer(grace_seconds, _end, (STATUS, f"asked to end {grace_seconds:g} s ago", last_words))
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


def _end(status: int, why: str, last_words: Callable[[], str]) -> NoReturn:
    print(f"\ntwinstack: {why}; {last_words()}", file=sys.stderr, flush=True)
    os._exit(status)
