"""Chooses the examples that a report shows, and marks how a prediction differs from its target."""

import difflib
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.report.examples import PairedExample

if TYPE_CHECKING:
    from markupsafe import Markup

MAX_CHARACTERS = 600
"""Longest text in the report; longer ones are cut."""
_SPACES = {
    " ": "⟨space⟩",
    "\u00a0": "⟨no-break space⟩",
    "\u202f": "⟨narrow no-break space⟩",
    "\u2009": "⟨thin space⟩",
    "\n": "⟨new line⟩",
    "\t": "⟨tab⟩",
}


def choose(examples: Sequence[PairedExample], count: int) -> tuple[PairedExample, ...]:
    """Returns up to `count` examples, one of each kind (split, group) in turn, so that no kind crowds out the others.

    Kinds, and examples within a kind, are in order of appearance.
    """
    kinds: dict[tuple[str, str], list[PairedExample]] = {}
    for example in examples:
        kinds.setdefault((example.split, example.group), []).append(example)
    turns = itertools.zip_longest(*kinds.values())
    return tuple(itertools.islice((e for turn in turns for e in turn if e is not None), count))


def mark_difference(target: str, prediction: str) -> "Markup":
    """Returns `prediction` as HTML, with wrong pieces in <del> and the target's in <ins>.

    Pieces are words, runs of spaces and single signs. Each is escaped before a tag is put around it. A difference in
    spaces only is spelled out.

    >>> mark_difference("5 € & mehr", "5 $ & mehr")
    Markup('5 <del>$</del><ins>€</ins> &amp; mehr')
    """
    from markupsafe import Markup, escape

    wanted, found = _split_words(target), _split_words(prediction)
    parts = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, wanted, found, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(escape("".join(found[k:m])))
            continue
        for tag, pieces in (("del", found[k:m]), ("ins", wanted[i:j])):
            if pieces:
                parts.append(Markup(f"<{tag}>%s</{tag}>") % _spell_spaces("".join(pieces)))
    return Markup("").join(parts)


def shorten(text: str) -> str:
    """
    >>> shorten("a" * 1000)[-3:], len(shorten("a" * 1000)) == MAX_CHARACTERS
    ('aa…', True)
    """
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"


def _split_words(text: str) -> list[str]:
    return re.findall(r"\w+|\s+|[^\w\s]", shorten(text))


def _spell_spaces(text: str) -> str:
    """Spells out text that is only spaces, because a difference in spaces would be invisible."""
    return "".join(_SPACES.get(sign, f"⟨U+{ord(sign):04X}⟩") for sign in text) if text.isspace() else text
