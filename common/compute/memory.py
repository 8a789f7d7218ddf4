"""Reads what a program reserves in a device's main memory from the files of XLA's buffer assignment."""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from common.compute.hlo import Program

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*)$")
_VALUE = re.compile(r"^ value: <\d+ ([\w.-]+)(\{[\d,]*\})?[^>]*> \(size=(\d+),offset=(\d+)\): (.*)$")
_ALIVE = re.compile(r"^\s+([\w.-]+)(\{[\d,]*\}):(\d+)-(\d+)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """A temporary that is alive at the program's peak."""

    bytes: int
    """Size with padding."""
    array: str
    """Dtype and shape."""
    made_by: str
    """The operation of the Python program that made it, as XLA names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that the program reserves in one device's HBM, with padding."""

    arguments: dict[str, int]
    """By the argument's name up to its first index, such as `state.params`."""
    outputs: int
    """Results that do not reuse an argument's memory."""
    temporaries: int
    """The block that all temporaries share over time."""
    at_peak: int
    """The most of that block that is in use at once."""
    largest: tuple[Buffer, ...]
    """The largest buffers in use at that moment, largest first."""

    @property
    def total(self) -> int:
        return sum(self.arguments.values()) + self.outputs + self.temporaries


class _Value(NamedTuple):
    """One value in the block of temporaries."""

    name: str
    """With its place in the result of the instruction that makes it, such as `late{0}`."""
    bytes: int
    offset: int
    array: str


def read_memory(assignment: str, live_ranges: str, optimised: Program, count: int = 6) -> Memory:
    """Parses the texts of `*-buffer-assignment.txt` and `*-live-range.txt`; lists the `count` largest buffers.

    The buffer assignment lists allocations, and the values in each with their place:

        allocation 4: size 20480, page 0, preallocated-temp:
         value: <5 late{0} (phi) @1> (size=12288,offset=8192): f32[24,128]{1,0:T(8,128)}
    """
    arguments: dict[str, int] = {}
    outputs, temporaries = 0, 0
    values: list[_Value] = []
    names = _argument_names(optimised)
    in_block = False
    for line in assignment.splitlines():
        if allocation := _ALLOCATION.match(line):
            allocated, kind = int(allocation.group(1)), allocation.group(2)
            in_block = "preallocated-temp" in kind and "color" not in kind
            if "color" in kind or "thread-local" in kind:
                continue
            if parameter := re.search(r"parameter (\d+)", kind):
                name = names.get(int(parameter.group(1)), "other")
                arguments[name] = arguments.get(name, 0) + allocated
            elif in_block:
                temporaries += allocated
            else:
                outputs += allocated
        elif in_block and (value := _VALUE.match(line)):
            name, index, size, offset, array = value.groups()
            values.append(_Value(name + (index or "{}"), int(size), int(offset), array))
    at_peak, alive = _peak(values, _lifetimes(live_ranges))
    return Memory(
        arguments=arguments,
        outputs=outputs,
        temporaries=temporaries,
        at_peak=at_peak,
        largest=tuple(_buffer(value, optimised) for value in alive[:count]),
    )


def _argument_names(optimised: Program) -> dict[int, str]:
    """Maps each parameter's number to the first two parts of its name, without indices."""
    found = {}
    for instruction in optimised.computations[optimised.entry].values():
        if instruction.opcode == "parameter" and (number := re.match(r"\((\d+)\)", instruction.rest)):
            name = re.split(r"[\[(]", instruction.op_name)[0]
            found[int(number.group(1))] = ".".join(name.split(".")[:2]) or "other"
    return found


def _lifetimes(live_ranges: str) -> dict[str, tuple[int, int]]:
    """Maps each value, such as `late{0}`, to the (first, last) moment at which it is alive."""
    lines = (_ALIVE.match(line) for line in live_ranges.splitlines())
    return {line.group(1) + line.group(2): (int(line.group(3)), int(line.group(4))) for line in lines if line}


def _peak(values: list[_Value], lifetimes: Mapping[str, tuple[int, int]]) -> tuple[int, list[_Value]]:
    """The most bytes in use at one moment, and the values alive then, largest first.

    Values with the same size and offset are one buffer.
    """
    moments = sorted({lifetimes[value.name][0] for value in values if value.name in lifetimes})
    most, at_peak = 0, []
    for moment in moments:
        buffers: dict[tuple[int, int], _Value] = {}
        for value in values:
            first, last = lifetimes.get(value.name, (1, 0))
            if first <= moment <= last:
                buffers.setdefault((value.bytes, value.offset), value)
        used = _covered([(offset, offset + size) for size, offset in buffers])
        if used > most:
            most, at_peak = used, list(buffers.values())
    return most, sorted(at_peak, key=lambda value: -value.bytes)


def _covered(intervals: list[tuple[int, int]]) -> int:
    """The total length that the intervals cover."""
    total, end = 0, 0
    for first, last in sorted(intervals):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def _buffer(value: _Value, optimised: Program) -> Buffer:
    name = value.name.partition("{")[0]
    makers = [body[name] for body in optimised.computations.values() if name in body]
    return Buffer(
        bytes=value.bytes,
        array=value.array.partition("{")[0].removeprefix("("),  # the first array of a tuple
        made_by=(makers[0].op_name if makers else "") or name,
    )
