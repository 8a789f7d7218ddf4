"""Ranges of numbers in configs: which ends they include, messages, and where ranges are found in types."""

import dataclasses
import math
from typing import Annotated

import pytest

from common.errors import UserError
from common.ranges import Count, Range, check_ranges, ranges_of


@pytest.mark.parametrize(
    ("ends", "inside"), [("[]", (0.0, 1.0)), ("[)", (0.0,)), ("(]", (1.0,)), ("()", ())], ids=["[]", "[)", "(]", "()"]
)
def test_square_brackets_include_an_end(ends, inside):
    allowed = Range(0, 1, ends)
    for value in (0.0, 1.0):
        if value in inside:
            allowed.check("x", value)
        else:
            with pytest.raises(UserError, match=f"^x is {value}: it must be"):
                allowed.check("x", value)
    allowed.check("x", 0.5)


@pytest.mark.parametrize(
    ("allowed", "value", "message"),
    [
        (Range(1, 2**20, unit="rows"), 2**40, "n is 1,099,511,627,776: it must be at most 1,048,576 rows"),
        (Range(1, 2**20, unit="rows"), 0, "n is 0: it must be 1 or more"),
        (Range(0, 1, "()"), math.nan, "n is nan: it must be more than 0 and less than 1"),
        (Range(0, 1), math.inf, "n is inf: it must be at most 1"),
        (Range(0, 1), 10**5000, "n is a number of 16,610 bits: it must be at most 1"),
    ],
    ids=range(5),
)
def test_the_message_gives_the_number_and_the_valid_range(allowed, value, message):
    with pytest.raises(UserError) as caught:
        allowed.check("n", value)
    assert str(caught.value) == message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    layers: Count
    name: str = ""
    free: float = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Derived(Base):
    chunk: Count | None = None
    shares: tuple[Annotated[float, Range(0, 1)], ...] = ()
    weights: dict[str, Annotated[float, Range(0, 1)]] = dataclasses.field(default_factory=dict)


def test_ranges_are_found_in_unions_tuples_dicts_and_base_classes():
    assert list(ranges_of(Derived)) == ["layers", "chunk", "shares", "weights"]
    Derived(layers=1, shares=(0.0, 1.0), weights={"a": 0.5})
    for wrong in ({"layers": 0}, {"chunk": 0}, {"shares": (0.0, 1.5)}, {"weights": {"a": -1.0}}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Derived(**{"layers": 1, **wrong})
