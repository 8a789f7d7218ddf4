"""Storage that refuses for a while: a full disk, a bucket that is busy."""

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
"""HTTP statuses after which one should try again."""
_UNAVAILABLE = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED): ")
_SYSTEM = re.compile(r"\[os_error_code='(\d+)'\]")
"""As TensorStore words it."""


def refusal(error: BaseException) -> str | None:
    """In a line, how storage refused; None where `error` is of another kind, which no waiting mends.

    >>> refusal(OSError(28, "No space left on device"))
    '[Errno 28] No space left on device'
    >>> refusal(ValueError("RESOURCE_EXHAUSTED: Failed to write 9 bytes [os_error_code='28'] and much more"))
    '[Errno 28] No space left on device'
    >>> refusal(ValueError("UNAVAILABLE: Error reading gs://bucket/x: HTTP 503"))
    'UNAVAILABLE: Error reading gs://bucket/x: HTTP 503'
    >>> refusal(FileNotFoundError(2, "No such file")) or refusal(ValueError("its arrays are not those"))
    """
    for one in _chain(error):
        if found := _SYSTEM.search(str(one)):  # in the midst of paths and specifications
            one = OSError(int(found[1]), os.strerror(int(found[1])))  # which makes it of its proper kind
        missing = isinstance(one, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        of_system = isinstance(one, OSError) and not missing
        if of_system or getattr(one, "code", None) in BUSY or _UNAVAILABLE.match(str(one)):
            return textwrap.shorten(str(one), 200)
    return None


class Backoff:
    """Since when storage has refused, and how long to wait before it is asked again."""

    def __init__(self, patience_seconds: float):
        self.patience_seconds = patience_seconds
        self.reset()

    def reset(self) -> None:
        """It has not refused."""
        self._since: float | None = None
        self._pause = FIRST_PAUSE

    @property
    def refused_seconds(self) -> float:
        return 0.0 if self._since is None else time.monotonic() - self._since

    def pause(self) -> float | None:
        """Seconds to wait after a refusal, each time twice as many; None when there is no patience left."""
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
    """Does it, and does it again as long as storage refuses; each refusal is said aloud.

    Raises UserError with `advice` when it has refused for `patience_seconds`.
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


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
