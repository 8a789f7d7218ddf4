"""Being asked to end: SIGTERM, which schedulers send before they take a machine away."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Preempted(SystemExit):
    """A run that was asked to end has been saved; the process ends with the status of a process that SIGTERM ends."""

    def __init__(self, step: int) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.step = step


@contextlib.contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM ends nothing; what is given tells whether it has come.

    Only the main thread can hear it; elsewhere nothing changes.
    """
    come = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield come.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: come.set())
    try:
        yield come.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
