"""Reads a foreign config.json field by field, and refuses by name what it does not support."""

from collections.abc import Iterable, Mapping
from typing import Any

from common.errors import UserError

_REQUIRED: Any = object()
LARGEST = 2**31 - 1
SHOWN = 80
"""How many characters of a value an error message repeats."""


class Settings:
    """The fields of a JSON object; every method raises UserError naming a field with an unsupported value.

    >>> settings = Settings({"d_model": 512, "act": "tanh"}, where="config.json")
    >>> settings.integer("d_model", "hidden_size"), settings.integer("heads", default=8)
    (512, 8)
    >>> settings.only("act", ["relu", None], default="relu")
    Traceback (most recent call last):
        ...
    common.errors.UserError: config.json: act is 'tanh', which is not supported; supported: 'relu', None
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def integer(self, *names: str, default: Any = _REQUIRED) -> Any:
        """A size: the value of the first of `names` that is present and not null."""
        name, value = self._first(names, default)
        if value is not default and not (type(value) is int and 0 < value <= LARGEST):
            raise self.refusal(name, value, f"a whole number from 1 to {LARGEST}")
        return value

    def number(self, *names: str, default: Any = _REQUIRED) -> Any:
        """As `integer`, for a number that is not negative; returned as a float."""
        name, value = self._first(names, default)
        if value is not default and not (type(value) in (int, float) and 0 <= value <= LARGEST):
            raise self.refusal(name, value, f"a number from 0 to {LARGEST}")
        return value if value is None else float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A boolean; `default` if it is absent or null."""
        _, value = self._first((name,), default)
        if not isinstance(value, bool):
            raise self.refusal(name, value, "true, false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string; `default` if it is absent or null."""
        _, value = self._first((name,), default)
        if value is not default and not isinstance(value, str):
            raise self.refusal(name, value, "a string")
        return value

    def only(self, name: str, supported: Iterable[Any], default: Any) -> Any:
        """The field's value, or `default` if it is absent; must be one of `supported`."""
        supported = list(supported)
        value = self.values.get(name, default)
        # True == 1 in Python, but not in JSON.
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in supported):
            raise self.refusal(name, value, ", ".join(map(repr, supported)))
        return value

    def refusal(self, name: str, value: Any, supported: str) -> UserError:
        """The error for an unsupported value; `supported` lists what would be valid."""
        return UserError(f"{self.where}: {name} is {shown(value)}, which is not supported; supported: {supported}")

    def _first(self, names: tuple[str, ...], default: Any) -> tuple[str, Any]:
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        if default is _REQUIRED:
            raise UserError(f"{self.where}: {names[0]} is missing")
        return names[0], default


def shown(value: Any) -> str:
    """The value as error messages show it, cut to `SHOWN` characters.

    >>> shown("a" * 100)[-5:]
    'aa...'
    """
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def token_ids(value: Any, where: str) -> list[int]:
    """Token ids as a list, from one id, a list of ids or None.

    Raises UserError, which calls the value `where`, if any is not a token id.

    >>> token_ids(1, ""), token_ids([2, 3], ""), token_ids(None, "")
    ([1], [2, 3], [])
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(one) is int and 0 <= one <= LARGEST for one in ids):
        raise UserError(f"{where} is {shown(value)}: token ids are whole numbers from 0 to {LARGEST}")
    return ids
