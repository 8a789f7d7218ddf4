"""Retries when storage refuses for a while: a full disk, a busy bucket."""

import os
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from common.errors import UserError

Result = TypeVar("Result")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
BUSY = {408, 429, 500, 502, 503, 504}
"""HTTP statuses that ask for a retry."""
_UNAVAILABLE = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): ")
_SYSTEM = re.compile(r"\[os_error_code='(\d+)'\]")
"""How TensorStore reports errors of the operating system."""


def refusal(error: BaseException) -> str | None:
    """Returns one line on how storage refused, or None if `error` is of a kind that waiting cannot cure.

    >>> refusal(OSError(28, "No space left on device"))
    '[Errno 28] No space left on device'
    >>> refusal(ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes [os_error_code='28'] and much more"))
    '[Errno 28] No space left on device'
    >>> refusal(ValueError("UNAVAILABLE: Error reading gs://bucket/x: HTTP 503"))
    'UNAVAILABLE: Error reading gs://bucket/x: HTTP 503'
    >>> refusal(FileNotFoundError(2, "No such file")) or refusal(ValueError("its checksums differ"))
    """
    for cause in _causes(error):
        if found := _SYSTEM.search(str(cause)):  # in the middle of paths and specifications
            cause = OSError(int(found[1]), os.strerror(int(found[1])))  # Python picks the subclass for the number
        missing = isinstance(cause, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        system = isinstance(cause, OSError) and not missing
        if system or getattr(cause, "code", None) in BUSY or _UNAVAILABLE.match(str(cause)):
            return textwrap.shorten(str(cause), 200)
    return None


class Backoff:
    """Keeps how long storage has refused, and how long to wait before the next attempt."""

    def __init__(self, patience_seconds: float):
        self.patience_seconds = patience_seconds
        self.reset()

    def reset(self) -> None:
        """Notes a success."""
        self._since: float | None = None
        self._pause = FIRST_PAUSE

    @property
    def refused_seconds(self) -> float:
        """Seconds since the first refusal after the last success; 0 if there was none."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def pause(self) -> float | None:
        """Returns the seconds to wait after a refusal, doubling each time; None if patience is exhausted."""
        if self._since is None:
            self._since = time.monotonic()
        left = self.patience_seconds - self.refused_seconds
        if left <= 0:
            return None
        seconds, self._pause = min(self._pause, left), min(2 * self._pause, LONGEST_PAUSE)
        return seconds


def patiently(
    action: Callable[[], Result], what: str, *, patience_seconds: float, note: Callable[[str], None], advice: str
) -> Result:
    """Calls `action` until storage no longer refuses, and returns its result; notes each refusal.

    `what` names in messages what is read or written. Raises UserError with `advice` once storage has refused for
    `patience_seconds`, and any other error at once.
    """
    backoff = Backoff(patience_seconds)
    while True:
        try:
            return action()
        except Exception as error:
            why = refusal(error)
            if why is None:
                raise
            pause = backoff.pause()
            if pause is None:
                raise UserError(f"{what}: refused for {backoff.refused_seconds:.0f} s ({why}); {advice}") from error
            note(f"{what}: refused ({why}); again in {pause:.0f} s")
            time.sleep(pause)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, then what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
