"""JSON as this project reads it, in files, records and on the command line.

Python's own reader takes more than JSON is (`NaN`, a name twice in one object), and fails in ways of its own at
hostile text (thousands of brackets, thousands of digits). Here all of that is a ValueError.
"""

import json
import re
from typing import Any

DEEPEST = 100
"""Levels that arrays and objects may be nested."""
MOST_DIGITS = 300
"""The most digits of a whole number; more would exceed the range of a float, which some readers use for all."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """The value that `text` describes; bytes are UTF-8. With `finite=False` NaN and infinity are numbers too.

    Raises json.JSONDecodeError where it is not JSON, and another ValueError, in words for users, where it is JSON that
    is refused: nested too deeply, a number too large, a name twice in one object, half of a surrogate pair.

    >>> parse_json('{"steps": 10}')
    {'steps': 10}
    >>> parse_json('{"steps": 10, "steps": 20}')
    Traceback (most recent call last):
        ...
    ValueError: two fields are named 'steps'
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    try:
        value = (_FINITE if finite else _ANY).decode(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value)
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"two fields are named {twice!r}")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits.removeprefix('-')):,} digits; {MOST_DIGITS} are the most")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if abs(number) == float("inf"):
        raise ValueError(f"the number {digits[:20]}{'...' if digits[20:] else ''} is too large")
    return number


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [inner for each in level for inner in _inner(each)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _inner(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = json.dumps(error.object[error.start])
        raise ValueError(f"a text holds {half}, half of a surrogate pair, which stands for no character") from None


# Made once: a decoder takes longer to make than to read a line.
_FINITE = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole, parse_float=_real, parse_constant=_no_constant)
_ANY = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole)
