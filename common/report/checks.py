"""Answers to the questions of a parity certificate."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

NAMED = 8
"""Most names that a detail lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """A question, its answer and the numbers that support it."""

    name: str
    agrees: bool | None
    """None if it could not be checked."""
    detail: str


def all_agree(answers: Sequence[bool | None]) -> bool | None:
    """Returns False if any check differs, else None if any could not be made, else True.

    >>> all_agree([True, True]), all_agree([True, None, False]), all_agree([True, None])
    (True, False, None)
    """
    return False if False in answers else None if None in answers else True


def by_name(values: Mapping[str, Any]) -> str:
    """Lists names with their values, the first `NAMED` of them.

    >>> by_name({"a": 1, "b": 2})
    'a 1, b 2'
    """
    shown = [f"{name} {value}" for name, value in list(values.items())[:NAMED]]
    more = [f"and {len(values) - NAMED} more"] if len(values) > NAMED else []
    return ", ".join(shown + more)
