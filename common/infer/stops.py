"""Stop strings, looked for in text: a tokenizer may cut the same string in many ways."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not yet one."""


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins.

    >>> find_stop("one. two.", [" two", ". "])
    3
    """
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, default=None)


def settled(text: str, stops: Sequence[str]) -> int:
    """How many characters can be shown already, whatever follows.

    Kept back are the beginning of what may become a stop string, and the bytes of what may become a character.

    >>> settled("Hello. Q", ["Q:"]), settled("Hello. Q!", ["Q:"]), settled("caf\ufffd", [])
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
    """The fewest tokens whose text holds a stop string, and the text before it; None where there is none.

    `write(n)` is the text of the first n tokens; those of the first `checked` hold none.
    """
    if find_stop(write(length), stops) is None:
        return None
    for count in range(checked + 1, length + 1):
        text = write(count)
        place = find_stop(text, stops)
        if place is not None:
            return count, text[:place]
    raise AssertionError("the last count holds one")
