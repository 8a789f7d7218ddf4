"""Passes on the standard error of one of several processes, and reports at its end which process was lost.

This is a separate program (`python lost.py < standard error`) that uses only the standard library, because it must
outlive the process that it reads from.
"""

import re
import sys
from collections.abc import Iterable

FATAL = "JAX distributed service detected fatal errors"
SILENT = re.compile(r"stopped sending heartbeats\):\n((?:\S*\d+\n)+)")
NUMBER = re.compile(r"(\d+)\n")
LEADER = "Failed to send RPC to coordination service"
EARLY = re.compile(r"The first task at the barrier: \S*?(\d+)\.")
LAST_LINES = 200
"""How many lines at the end are searched."""


def verdict(text: str) -> str | None:
    """Returns a clause on which process was lost, from JAX's last messages; None if they report no loss.

    >>> verdict("F1 JAX distributed service detected fatal errors: (stopped sending heartbeats):\\n1\\nThe tasks have")
    'process 1 was lost'
    """
    _, found, last = text.rpartition(FATAL)
    if not found:
        return None
    if silent := SILENT.search(last):
        numbers = NUMBER.findall(silent[1])
        return f"process {numbers[0]} was lost" if len(numbers) == 1 else f"processes {', '.join(numbers)} were lost"
    if early := EARLY.search(last):
        return f"process {early[1]} ended before the others"
    if LEADER in last:
        return "process 0, or the connection to it, was lost"
    return "another process was lost"


def main(lines: Iterable[str]) -> None:
    last: list[str] = []
    for line in lines:
        sys.stderr.write(line)
        sys.stderr.flush()
        last = [*last[-LAST_LINES:], line]
    if lost := verdict("".join(last)):
        print(
            f"twinstack: error: {lost}, so this one was ended; repeat the command on all processes to resume from the "
            "last checkpoint",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    main(sys.stdin)
