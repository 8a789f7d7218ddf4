"""Which examples a report shows, errors first, and how a prediction differs from its target."""

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from common.report.verdicts import Example

if TYPE_CHECKING:
    from markupsafe import Markup

MAX_CHARACTERS = 600
"""Of a text in the report; longer ones are cut."""
_SPACES = {
    " ": "⟨space⟩",
    "\u00a0": "⟨no-break space⟩",
    "\u202f": "⟨narrow no-break space⟩",
    "\u2009": "⟨thin space⟩",
    "\n": "⟨new line⟩",
    "\t": "⟨tab⟩",
}


def choose(examples: Sequence[Example], count: int) -> tuple[Example, ...]:
    """Up to `count` examples, one of each (split, group) in turn, so that no kind crowds out the others.

    Kinds come in order of appearance, and so do the examples within a kind.
    """
    kinds: dict[tuple[str, str], list[Example]] = {}
    for example in examples:
        kinds.setdefault((example.split, example.group), []).append(example)
    turns = itertools.zip_longest(*kinds.values())
    return tuple(itertools.islice((e for turn in turns for e in turn if e is not None), count))


def mark_difference(target: str, prediction: str) -> "Markup":
    """`prediction` as HTML, with what is wrong in <del> and what should stand there in <ins>.

    Texts are escaped piece by piece before any tag is put around them. Words, runs of spaces and single signs are
    compared, and a difference in spaces alone is named.

    >>> mark_difference("5 € & mehr", "5 $ & mehr")
    Markup('5 <del>$</del><ins>€</ins> &amp; mehr')
    """
    from markupsafe import Markup, escape

    wanted, found = _pieces(target), _pieces(prediction)
    parts = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, wanted, found, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(escape("".join(found[k:m])))
            continue
        for tag, pieces in (("del", found[k:m]), ("ins", wanted[i:j])):
            if pieces:
                parts.append(Markup(f"<{tag}>%s</{tag}>") % _show_spaces("".join(pieces)))
    return Markup("").join(parts)


def shorten(text: str) -> str:
    """
    >>> shorten("a" * 1000)[-3:], len(shorten("a" * 1000)) == MAX_CHARACTERS
    ('aa…', True)
    """
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"


def _pieces(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", shorten(text))


def _show_spaces(text: str) -> str:
    """Names spaces that stand alone: as a difference they would be invisible."""
    return "".join(_SPACES.get(sign, f"⟨U+{ord(sign):04X}⟩") for sign in text) if text.isspace() else text


def count_wrong(examples: Iterable[Example]) -> int:
    """Examples that at least one arm got wrong."""
    return sum(example.wrong > 0 for example in examples)
