"""Parses JSON strictly, for files, records and the command line.

Python's own parser accepts more than JSON (`NaN`, repeated names in an object) and raises errors of other types on
hostile text (thousands of brackets or digits). Here every such text is a ValueError.
"""

import json
import re
from typing import Any

DEEPEST = 100
"""Most levels of nested arrays and objects."""
MOST_DIGITS = 300
"""Most digits of an integer; longer ones exceed the range of a float, which some parsers use for every number."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Returns the value that `text`, in bytes UTF-8, describes. `finite=False` also accepts NaN and infinity.

    Raises:
        json.JSONDecodeError: if `text` is not JSON.
        ValueError: with a message for users, if `text` is JSON that this project refuses: nested too deeply, a number
            that is too large, a repeated name in an object, an unpaired surrogate.

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


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"two fields are named {twice!r}")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _parse_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits.removeprefix('-')):,} digits; at most {MOST_DIGITS} are allowed")
    return int(digits)


def _parse_float(digits: str) -> float:
    number = float(digits)
    if abs(number) == float("inf"):
        raise ValueError(f"the number {digits[:20]}{'...' if digits[20:] else ''} is too large")
    return number


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level := [child for parent in level for child in _children(parent)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = json.dumps(error.object[error.start])
        raise ValueError(f"a text contains {half}, half of a surrogate pair, which is not a character") from None


# Constructed once: constructing a decoder takes longer than parsing a line.
_FINITE = json.JSONDecoder(
    object_pairs_hook=_unique_names, parse_int=_parse_int, parse_float=_parse_float, parse_constant=_refuse_constant
)
_ANY = json.JSONDecoder(object_pairs_hook=_unique_names, parse_int=_parse_int)
