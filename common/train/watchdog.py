"""Ends a run that hangs, and leaves the stacks of all its threads behind."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STALLED = os.EX_TEMPFAIL
"""Exit status (75) of a run that was ended because it hung: a launcher should launch it again."""


@contextlib.contextmanager
def watched(stacks: Path, stall_seconds: float) -> Iterator[Callable[[], None]]:
    """Within, the process ends with status `STALLED` when what is given has not been called for `stall_seconds`.

    Before that the stacks of all threads go to the file `stacks` and to standard error.
    """
    heard = time.monotonic()
    over = threading.Event()

    def alive() -> None:
        nonlocal heard
        heard = time.monotonic()

    def watch() -> None:
        while not over.wait(max(0.0, heard + stall_seconds - time.monotonic())):
            if time.monotonic() >= heard + stall_seconds:
                _end(stacks, stall_seconds)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield alive
    finally:
        over.set()
        thread.join()


def _end(stacks: Path, stall_seconds: float) -> None:
    print(
        f"\ntwinstack: nothing has moved for {stall_seconds:g} s; the stacks of all threads are in {stacks}; "
        f"ended with status {STALLED}, the same command resumes",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(file=sys.stderr)
    with contextlib.suppress(OSError), open(stacks, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file=file)
    os._exit(STALLED)
