"""Being asked to end: SIGTERM, which schedulers send before they take a machine away."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

STATUS = 128 + signal.SIGTERM
"""Exit status (143) of a process that SIGTERM ends."""


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
    """
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
                print(f"\ntwinstack: asked to end {grace_seconds:g} s ago; {last_words()}", file=sys.stderr, flush=True)
                os._exit(STATUS)

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
