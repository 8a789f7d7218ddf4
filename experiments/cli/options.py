"""Values of the command line: paths, numbers and names, each read once and refused with the option's name."""

import argparse
import math
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import UserError, nearest
from common.paths import user_path
from common.ranges import Range, Tokens
from common.recipe import Dtype
from experiments import find

ANY = Range(-math.inf, math.inf)
"""For numbers whose range is checked by the code that takes them."""
LONGEST = 30
"""Characters of a number."""
DATA_ACTIONS = ("show", "prepare")


def storing(read: Callable[[str, str], Any]) -> type[argparse.Action]:
    """Returns an argparse action that stores `read(name, text)`, where `name` is the option or the argument's name.

    An argparse `type` would not do: argparse replaces the message of any ValueError, and a UserError is one.
    """

    class Storing(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: str | Sequence[Any] | None,
            option: str | None = None,
        ) -> None:
            setattr(namespace, self.dest, read(option or str(self.metavar), str(values)))

    return Storing


def _path(name: str, text: str) -> Any:
    return user_path(text, name)


def _study(name: str, text: str) -> str:
    find.check_name(text)
    return text


def _data_action(name: str, text: str) -> str:
    if text not in DATA_ACTIONS:
        raise UserError(f"unknown action {text!r}: {nearest(text, DATA_ACTIONS)}")
    return text


def _dtype(name: str, text: str) -> str:
    valid = typing.get_args(Dtype)
    if text not in valid:
        raise UserError(f"{name} {text}: {nearest(text, valid)}")
    return text


def _lengths(name: str, text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(re.fullmatch(rf"[1-9]\d{{0,{LONGEST}}}", number, flags=re.ASCII) for number in numbers):
        raise UserError(f"{name} {text!r} must be whole numbers with commas, such as 32,128,512")
    lengths = tuple(map(int, numbers))
    for length in lengths:
        typing.get_args(Tokens)[1].check(name, length)
    return lengths


AsPath = storing(_path)
"""Stores a Path, with `~` expanded."""
AsStudy = storing(_study)
"""Stores the name of a study, or the path of a file that holds one."""
AsDataAction = storing(_data_action)
"""Stores what `twinstack data` does."""
AsDtype = storing(_dtype)
"""Stores the name of a dtype of computation."""
AsLengths = storing(_lengths)
"""Stores whole numbers that are separated by commas."""


def whole(stated: Any = ANY) -> type[argparse.Action]:
    """Stores a whole number of a range, or of a type that states its range (`common.ranges`)."""
    return _number(stated, int, r"[+-]?\d+", "a whole number")


def real(stated: Any = ANY) -> type[argparse.Action]:
    """Stores a number of a range, or of a type that states its range."""
    return _number(stated, float, r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", "a number")


def _number(stated: Any, kind: type[int] | type[float], pattern: str, what: str) -> type[argparse.Action]:
    within = stated if isinstance(stated, Range) else typing.get_args(stated)[1]

    def read(name: str, text: str) -> int | float:
        if len(text) > LONGEST or not re.fullmatch(pattern, text, flags=re.ASCII):
            shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
            raise UserError(f"{name} is {shown!r}: it must be {what}")
        within.check(name, kind(text))
        return kind(text)

    return storing(read)


def check_text(arguments: Sequence[str]) -> None:
    """Raises UserError for an argument that is not valid UTF-8 or holds a NUL character."""
    for argument in arguments:
        if "\0" in argument or any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(f"the argument {argument!r} is not text: it is not UTF-8, or contains a NUL character")
