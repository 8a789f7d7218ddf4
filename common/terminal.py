"""Text from data, files and models as a terminal may show it."""

import json
import unicodedata

_KEPT = "\n\t\u200c\u200d"
"""Controls that texts are written with: Persian joins letters by the last two, emoji are made by the last."""
_CONTROLS = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def harmless(text: str) -> str:
    """Characters that move the cursor, retitle the window, turn the reading direction or cannot be seen, spelt out.

    They are spelt as in JSON, so that JSON is the same JSON afterwards; newlines and tabs stay.

    >>> print(harmless("a\\x1b[2J\\x9b\\u202e"))
    a\\u001b[2J\\u009b\\u202e
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_spelt, text))


def _spelt(character: str) -> str:
    control = character not in _KEPT and unicodedata.category(character) in _CONTROLS
    return json.dumps(character)[1:-1] if control else character


def marked_up(text: str) -> str:
    """The same for where rich looks for markup, which the text has none of.

    >>> marked_up("[bold]\\x07")
    '\\\\[bold]\\\\u0007'
    """
    from rich.markup import escape

    return escape(harmless(text))
