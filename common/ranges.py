"""The range of every number in a config: stated in its type, checked in one way when the config is made.

>>> @dataclasses.dataclass(frozen=True, kw_only=True)
... class Decay:
...     warmup_steps: Steps = 0
...     b1: Annotated[float, Range(0, 1, "[)")] = 0.9
...     shares: tuple[Share, ...] = ()
...     def __post_init__(self) -> None:
...         check_ranges(self)
>>> for wrong in ({"warmup_steps": -5}, {"b1": 1.0}, {"shares": (0.5, 2.0)}):
...     try:
...         Decay(**wrong)
...     except UserError as error:
...         print(error)
warmup_steps is -5: it must be 0 or more
b1 is 1.0: it must be less than 1
shares.1 is 2.0: it must be at most 1
"""

import dataclasses
import functools
import typing
from typing import Annotated, Any, Literal

from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The values from `low` to `high`; a round bracket in `ends` excludes that end."""

    low: float
    high: float
    ends: Literal["[]", "[)", "(]", "()"] = "[]"
    unit: str = ""

    def check(self, name: str, value: float) -> None:
        """Raises UserError where `value` is outside, or not a number."""
        broken = []
        if not (value > self.low or (value == self.low and self.ends[0] == "[")):
            broken.append(f"{_text(self.low)} or more" if self.ends[0] == "[" else f"more than {_text(self.low)}")
        if not (value < self.high or (value == self.high and self.ends[1] == "]")):
            high = f"{_text(self.high)} {self.unit}".rstrip()
            broken.append(f"at most {high}" if self.ends[1] == "]" else f"less than {high}")
        if broken:
            raise UserError(f"{name} is {_text(value)}: it must be {' and '.join(broken)}")


MOST_STEPS = 2**24
"""The largest step that float32, in which schedules are computed, distinguishes from the next one."""

Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, 1e12, "(]")]
NotNegative = Annotated[float, Range(0, 1e12)]
Tiny = Annotated[float, Range(1e-37, 1)]
"""An epsilon that keeps a quotient finite; float32 has no smaller normal number."""
Seconds = Annotated[float, Range(0, 10**9, "(]", "seconds")]
Steps = Annotated[int, Range(0, MOST_STEPS, unit="steps")]
Every = Annotated[int, Range(1, 10**9, unit="steps")]
"""An interval, which may be longer than any run."""
Seed = Annotated[int, Range(0, 2**32 - 1)]
"""A random seed, from the range that JAX distinguishes."""
Count = Annotated[int, Range(1, 10**9)]
Rows = Annotated[int, Range(1, 2**20, unit="rows")]
Tokens = Annotated[int, Range(1, 2**24, unit="tokens")]
Layers = Annotated[int, Range(1, 2**14, unit="layers")]
Width = Annotated[int, Range(1, 2**24)]
"""The size of an array along one axis: features, heads or table rows."""


def check_ranges(config: Any) -> None:
    """Raises UserError for the first number of a dataclass that is outside the range that its type states."""
    cls: Any = type(config)
    for name, stated in ranges_of(cls).items():
        for path, value in _numbers(getattr(config, name), name):
            stated.check(path, value)


@functools.cache
def ranges_of(cls: Any) -> dict[str, Range]:
    """The fields of a dataclass whose types state a range, which holds for each number in tuples and dicts too."""
    found = {name: _range_in(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: stated for name in names if (stated := found[name]) is not None}


def _range_in(annotation: Any) -> Range | None:
    own = [note for note in getattr(annotation, "__metadata__", ()) if isinstance(note, Range)]
    return next(iter(own or filter(None, map(_range_in, typing.get_args(annotation)))), None)


def _numbers(value: Any, path: str) -> list[tuple[str, float]]:
    if isinstance(value, int | float):
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    return [number for key, item in items for number in _numbers(item, f"{path}.{key}")]


def _text(number: float) -> str:
    if isinstance(number, int):
        return f"{number:,}" if number.bit_length() < 100 else f"a number of {number.bit_length():,} bits"
    return str(number)
