"""Ends a process that hangs, and saves the stacks of all its threads first."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STALLED = os.EX_TEMPFAIL
"""Exit status (75) of a run that was ended because it hung; a launcher should launch it again."""


@contextlib.contextmanager
def watched(stacks: Path, stall_seconds: float) -> Iterator[Callable[[], None]]:
    """Yields a heartbeat, and ends the process with status `STALLED` if it is not called for `stall_seconds`.

    Writes the stacks of all threads to the file `stacks` and to standard error first.
    """
    last_beat = time.monotonic()
    over = threading.Event()

    def alive() -> None:
        nonlocal last_beat
        last_beat = time.monotonic()

    def watch() -> None:
        while not over.wait(max(0.0, last_beat + stall_seconds - time.monotonic())):
            if time.monotonic() >= last_beat + stall_seconds:
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
        f"\ntwinstack: no progress for {stall_seconds:g} s; the stacks of all threads are in {stacks}; "
        f"ended with status {STALLED}, repeat the command to resume",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(file=sys.stderr)
    with contextlib.suppress(OSError), open(stacks, "w", encoding="utf-8") as file:
        faulthandler.dump_traceback(file=file)
    os._exit(STALLED)
