"""Ends a run on request: by SIGTERM, which schedulers send before they take a machine away, or SIGINT (Ctrl-C).

The request must be noticed while the main thread is blocked. Python runs a signal's handler between two instructions
of the main thread, which may wait in C code for minutes: for a device, or for a compiler. Until then a handler could
neither start the grace period nor obey a second Ctrl-C. But Python also writes the signal's number to a "wake-up" file
descriptor, and does so at once. Here that is a pipe, and a thread reads it:

    SIGTERM                         starts the timer that ends the process after the grace period
    SIGINT                          prints how to end at once
    SIGINT after SIGTERM or SIGINT  ends the process at once

The handler itself only records the signal, for the loop to ask after each step.

With several processes JAX receives SIGTERM instead, from when they join until they end. It makes all processes agree on
the step after which they stop, whichever of them received the signal; the grace period starts at that step.
"""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

STATUS = 128 + signal.SIGTERM
"""Exit status (143) of a process that SIGTERM ends."""
_calls = itertools.count()
"""Numbers the questions to JAX over all runs of this process: all processes must ask with the same number."""


class Preempted(SystemExit):
    """The run was asked to end and has been saved; the process exits with the status of one that the signal ended."""

    def __init__(self, step: int, status: int = STATUS) -> None:
        super().__init__(status)
        self.step = step


class Preemption:
    """Defers SIGTERM and SIGINT from its construction until `close`.

    The process is ended `grace_seconds` after SIGTERM, and at once by a SIGINT that follows another signal, whatever
    the main thread is doing; standard error then ends with what `last_words` returns. Signals can be deferred in the
    main thread only: constructed in another one, this changes nothing about them.
    """

    def __init__(self, grace_seconds: float, last_words: Callable[[], str]):
        self._last_words = last_words
        self._several = jax.process_count() > 1
        self._received: list[int] = []
        why = f"asked to end {grace_seconds:g} s ago"
        self._grace = threading.Timer(grace_seconds, _end, (STATUS, why, last_words))
        self._grace.daemon = True
        self._grace_started = False
        self._listening = threading.current_thread() is threading.main_thread()
        if self._listening:
            self._listen()

    def requested(self) -> bool:
        """Returns whether the run must be saved and ended now.

        With several processes, all must call this after each step; it returns the same in all.
        """
        if not self._several:
            return bool(self._received)
        reached = multihost_utils.reached_preemption_sync_point(next(_calls))
        if reached:
            self._start_grace()
        return reached

    @property
    def status(self) -> int:
        """Exit status of a process that the received signal ends."""
        return 128 + (self._received[0] if self._received else signal.SIGTERM)

    def close(self) -> None:
        """Gives the signals back to the handlers from before."""
        self._grace.cancel()
        if not self._listening:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        os.close(self._writing)
        self._thread.join()
        os.close(self._reading)

    def _listen(self) -> None:
        numbers = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
        # A shell's background job ignores SIGINT, and must go on doing so.
        self._handlers_before = {number: old for number, old in handlers.items() if old != signal.SIG_IGN}
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        for number in self._handlers_before:
            signal.signal(number, lambda number, frame: self._received.append(number))
        self._thread = threading.Thread(target=self._read_signals, name="preemption", daemon=True)
        self._thread.start()

    def _read_signals(self) -> None:
        """Reacts to each signal as it arrives; runs in a thread until the pipe is closed."""
        seen: set[int] = set()
        while data := os.read(self._reading, 1):
            number = data[0]
            if number == signal.SIGTERM:
                self._start_grace()
            elif number == signal.SIGINT and seen & {signal.SIGINT, signal.SIGTERM}:
                _end(128 + signal.SIGINT, "ended at once", self._last_words)
            elif number == signal.SIGINT:
                print("\ntwinstack: saving after the current step; press Ctrl-C again to end at once", file=sys.stderr)
                if self._several:
                    os.kill(os.getpid(), signal.SIGTERM)  # which JAX passes on to all processes
            seen.add(number)

    def _start_grace(self) -> None:
        if not self._grace_started:
            self._grace_started = True
            self._grace.start()


def _end(status: int, why: str, last_words: Callable[[], str]) -> NoReturn:
    print(f"\ntwinstack: {why}; {last_words()}", file=sys.stderr, flush=True)
    os._exit(status)
