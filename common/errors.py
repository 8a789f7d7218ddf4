"""Errors shown to users."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can correct; the command line prints it as one line and exits with status 2.

    The message says what is wrong, where, and the nearest valid choice.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns the end of an error message: the closest valid name, if one is close, and all valid names.

    >>> nearest("d_mdoel", ["d_ff", "d_model"])
    "did you mean 'd_model'? Valid: d_ff, d_model"
    >>> nearest("zzz", ["d_ff", "d_model"])
    'valid: d_ff, d_model'
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    listing = ", ".join(names) or "none"
    return f"did you mean {close[0]!r}? Valid: {listing}" if close else f"valid: {listing}"
