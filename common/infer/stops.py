"""Finds stop strings in text rather than in tokens, since a tokenizer may split the same string in many ways."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What a tokenizer decodes bytes to that are not, or not yet, a character."""


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Returns where the first stop string begins; None if there is none.

    >>> find_stop("one. two.", [" two", ". "])
    3
    """
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=None)


def settled_length(text: str, stops: Sequence[str]) -> int:
    """Returns how many characters can be shown now, whatever follows.

    Excludes the beginning of a possible stop string, and trailing bytes that may become a character.

    >>> settled_length("Hello. Q", ["Q:"]), settled_length("Hello. Q!", ["Q:"]), settled_length("caf\ufffd", [])
    (7, 9, 3)
    """
    end = len(text.rstrip(UNFINISHED)) if len(text) - len(text.rstrip(UNFINISHED)) < 4 else len(text)
    longest = max(map(len, stops), default=0)
    for begin in range(max(0, end - longest + 1), end):
        if any(stop.startswith(text[begin:end]) for stop in stops):
            return begin
    return end


def tokens_to_stop(
    write: Callable[[int], str], checked: int, length: int, stops: Sequence[str]
) -> tuple[int, str] | None:
    """Returns the fewest tokens whose text contains a stop string, and the text before it; None if there is none.

    `write(n)` returns the text of the first n tokens. The first `checked` tokens are known to contain none.
    """
    if find_stop(write(length), stops) is None:
        return None
    for count in range(checked + 1, length + 1):
        text = write(count)
        place = find_stop(text, stops)
        if place is not None:
            return count, text[:place]
    raise AssertionError("the text of all tokens contains a stop string")
