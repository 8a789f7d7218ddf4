"""Options of the command line that are paths and numbers: read once, refused by name."""

import argparse
import math
import re
import typing
from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from common.paths import user_path
from common.ranges import Range, Tokens

ANY = Range(-math.inf, math.inf)
"""For numbers whose range is checked by the code that takes them."""
LONGEST = 30
"""Characters of a number."""


class AsPath(argparse.Action):
    """Stores a Path, `~` replaced."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, user_path(str(values), option or str(self.metavar)))


def whole(stated: Any = ANY) -> type[argparse.Action]:
    """Stores a whole number of a range, or of a type that states one (`common.ranges`)."""
    return _number(stated, int, r"[+-]?\d+", "a whole number")


def real(stated: Any = ANY) -> type[argparse.Action]:
    """Stores a number of a range, or of a type that states one."""
    return _number(stated, float, r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", "a number")


def _number(stated: Any, kind: type[int] | type[float], form: str, what: str) -> type[argparse.Action]:
    within = stated if isinstance(stated, Range) else typing.get_args(stated)[1]

    class Number(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: str | int | Sequence[Any] | None,
            option: str | None = None,
        ) -> None:
            name, text = option or str(self.metavar), str(values)
            if len(text) > LONGEST or not re.fullmatch(form, text, flags=re.ASCII):
                cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
                raise UserError(f"{name} is {cut!r}: it must be {what}")
            within.check(name, kind(text))
            setattr(namespace, self.dest, kind(text))

    return Number


class Lengths(argparse.Action):
    """Stores whole numbers with commas between them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        numbers = str(values).split(",")
        if not all(re.fullmatch(rf"[1-9]\d{{0,{LONGEST}}}", number, flags=re.ASCII) for number in numbers):
            raise UserError(f"{option} {values!r} must be whole numbers with commas, such as 32,128,512")
        lengths = tuple(map(int, numbers))
        for length in lengths:
            typing.get_args(Tokens)[1].check(str(option), length)
        setattr(namespace, self.dest, lengths)


def check_text(arguments: Sequence[str]) -> None:
    """Raises UserError where one holds what no file, name or text of ours may."""
    for argument in arguments:
        if "\0" in argument or any("\ud800" <= character <= "\udfff" for character in argument):
            raise UserError(f"the argument {argument!r} is no text: it is not UTF-8, or holds a NUL character")
