"""Reads what a process of several writes to standard error, passes it on, and says at its end which one was lost.

A program of its own (`python lost.py < standard error`), and the standard library alone: it outlives what it reads.
"""

import re
import sys
from collections.abc import Iterable

FATAL = "JAX distributed service detected fatal errors"
SILENT = re.compile(r"stopped sending heartbeats\):\n((?:\S*\d+\n)+)")
NUMBER = re.compile(r"(\d+)\n")
LEADER = "Failed to send RPC to coordination service"
EARLY = re.compile(r"The first task at the barrier: \S*?(\d+)\.")
KEPT = 200
"""Lines at the end that are looked at."""


def verdict(text: str) -> str | None:
    """One line on whom JAX's last words tell of; None where they do not tell of a lost process.

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
        return "process 0, or the way to it, was lost"
    return "another process was lost"


def main(lines: Iterable[str]) -> None:
    kept: list[str] = []
    for line in lines:
        sys.stderr.write(line)
        sys.stderr.flush()
        kept = [*kept[-KEPT:], line]
    if said := verdict("".join(kept)):
        print(
            f"twinstack: error: {said}, so this one was ended; the same command, given to all processes, resumes "
            "from the last checkpoint",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    main(sys.stdin)
