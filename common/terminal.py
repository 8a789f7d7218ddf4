"""Makes text from data, files and models safe to print on a terminal."""

import json
import unicodedata

_KEPT = "\n\t\u200c\u200d"
"""Control characters that belong to text: the last two join letters in Persian and parts of an emoji."""
_CONTROLS = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode categories that are escaped."""


def harmless(text: str) -> str:
    """Escapes characters that move the cursor, set the window's title, reverse the reading direction or are invisible.

    Escapes are JSON's, so escaped JSON text still describes the same value. Newlines and tabs stay.

    >>> print(harmless("a\\x1b[2J\\x9b\\u202e"))
    a\\u001b[2J\\u009b\\u202e
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escape_control, text))


def _escape_control(character: str) -> str:
    control = character not in _KEPT and unicodedata.category(character) in _CONTROLS
    return json.dumps(character)[1:-1] if control else character


def marked_up(text: str) -> str:
    """Escapes as `harmless` does, and also what rich would read as markup.

    >>> marked_up("[bold]\\x07")
    '\\\\[bold]\\\\u0007'
    """
    from rich.markup import escape

    return escape(harmless(text))
