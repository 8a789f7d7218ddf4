"""The range of a number in a config is part of its type, and is checked when the config is made.

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
    """Numbers from `low` to `high`; a round bracket in `ends` excludes that end."""

    low: float
    high: float
    ends: Literal["[]", "[)", "(]", "()"] = "[]"
    unit: str = ""

    def check(self, name: str, value: float) -> None:
        """Raises UserError if `value` is outside the range, or NaN."""
        broken = []
        if not (value > self.low or (value == self.low and self.ends[0] == "[")):
            broken.append(f"{_format(self.low)} or more" if self.ends[0] == "[" else f"more than {_format(self.low)}")
        if not (value < self.high or (value == self.high and self.ends[1] == "]")):
            high = f"{_format(self.high)} {self.unit}".rstrip()
            broken.append(f"at most {high}" if self.ends[1] == "]" else f"less than {high}")
        if broken:
            raise UserError(f"{name} is {_format(value)}: it must be {' and '.join(broken)}")


MOST_STEPS = 2**24
"""The largest step that float32, the dtype of schedules, distinguishes from the next one."""

Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(0, 1e12, "(]")]
NotNegative = Annotated[float, Range(0, 1e12)]
Tiny = Annotated[float, Range(1e-37, 1)]
"""An epsilon in a denominator; smaller numbers are not normal in float32."""
Seconds = Annotated[float, Range(0, 10**9, "(]", "seconds")]
Steps = Annotated[int, Range(0, MOST_STEPS, unit="steps")]
Every = Annotated[int, Range(1, 10**9, unit="steps")]
"""An interval in steps, which may be longer than any run."""
Seed = Annotated[int, Range(0, 2**32 - 1)]
"""A random seed; JAX does not distinguish larger ones."""
Count = Annotated[int, Range(1, 10**9)]
Rows = Annotated[int, Range(1, 2**20, unit="rows")]
Tokens = Annotated[int, Range(1, 2**24, unit="tokens")]
Layers = Annotated[int, Range(1, 2**14, unit="layers")]
Width = Annotated[int, Range(1, 2**24)]
"""The size of an array along one axis: features, heads or table rows."""


def check_ranges(config: Any) -> None:
    """Raises UserError for the first number of a dataclass that is outside the range in its type."""
    cls: Any = type(config)
    for name, allowed in ranges_of(cls).items():
        for path, value in _numbers_in(getattr(config, name), name):
            allowed.check(path, value)


@functools.cache
def ranges_of(cls: Any) -> dict[str, Range]:
    """Returns the range in the type of each field that has one; it applies to every number in a tuple or dict."""
    found = {name: _range_in(hint) for name, hint in typing.get_type_hints(cls, include_extras=True).items()}
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: allowed for name in names if (allowed := found[name]) is not None}


def _range_in(annotation: Any) -> Range | None:
    own = [part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Range)]
    return next(iter(own or filter(None, map(_range_in, typing.get_args(annotation)))), None)


def _numbers_in(value: Any, path: str) -> list[tuple[str, float]]:
    """Returns every number in a value, tuple or dict, with its dotted path."""
    if isinstance(value, int | float):
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    return [number for key, item in items for number in _numbers_in(item, f"{path}.{key}")]


def _format(number: float) -> str:
    if isinstance(number, int):
        return f"{number:,}" if number.bit_length() < 100 else f"a number of {number.bit_length():,} bits"
    return str(number)
