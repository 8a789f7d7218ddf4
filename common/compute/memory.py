"""What lies in a device's main memory, from the files that XLA's buffer assignment leaves."""

import dataclasses
import re
from collections.abc import Mapping

from common.compute.hlo import Program

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*)$")
_VALUE = re.compile(r"^ value: <\d+ ([\w.-]+)(\{[\d,]*\})?[^>]*> \(size=(\d+),offset=(\d+)\): (.*)$")
_ALIVE = re.compile(r"^\s+([\w.-]+)(\{[\d,]*\}):(\d+)-(\d+)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """A temporary that is alive when most are."""

    bytes: int
    """With padding."""
    array: str
    """Dtype and shape."""
    made_by: str
    """Operation in the Python program, as XLA names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device's HBM that the program reserves, with padding."""

    arguments: dict[str, int]
    """By the argument's name up to the first index, such as `state.params`."""
    outputs: int
    """Results that take no argument's place."""
    temporaries: int
    """One block, in which temporaries take turns."""
    at_peak: int
    """How much of that block is in use when most is."""
    largest: tuple[Buffer, ...]
    """At that moment, the largest first."""

    @property
    def total(self) -> int:
        return sum(self.arguments.values()) + self.outputs + self.temporaries


def read_memory(assignment: str, live_ranges: str, optimised: Program, count: int = 6) -> Memory:
    """From the texts of `*-buffer-assignment.txt` and `*-live-range.txt`, and the optimised program."""
    arguments: dict[str, int] = {}
    outputs, temporaries = 0, 0
    values: list[tuple[str, int, int, str]] = []
    names = _argument_names(optimised)
    in_block = False
    for line in assignment.splitlines():
        if allocation := _ALLOCATION.match(line):
            size, kind = int(allocation.group(1)), allocation.group(2)
            in_block = "preallocated-temp" in kind and "color" not in kind
            if "color" in kind or "thread-local" in kind:
                continue
            if parameter := re.search(r"parameter (\d+)", kind):
                name = names.get(int(parameter.group(1)), "other")
                arguments[name] = arguments.get(name, 0) + size
            elif in_block:
                temporaries += size
            else:
                outputs += size
        elif in_block and (value := _VALUE.match(line)):
            name, index, size_, offset, array = value.groups()
            values.append((name + (index or "{}"), int(size_), int(offset), array))
    at_peak, alive = _fullest(values, _spans(live_ranges))
    return Memory(
        arguments=arguments,
        outputs=outputs,
        temporaries=temporaries,
        at_peak=at_peak,
        largest=tuple(_buffer(value, optimised) for value in alive[:count]),
    )


def _argument_names(optimised: Program) -> dict[int, str]:
    """Parameter number -> name without indices and fields below the second."""
    found = {}
    for instruction in optimised.computations[optimised.entry].values():
        if instruction.opcode == "parameter" and (number := re.match(r"\((\d+)\)", instruction.rest)):
            name = re.split(r"[\[(]", instruction.op_name)[0]
            found[int(number.group(1))] = ".".join(name.split(".")[:2]) or "other"
    return found


def _spans(live_ranges: str) -> dict[str, tuple[int, int]]:
    lines = (_ALIVE.match(line) for line in live_ranges.splitlines())
    return {line.group(1) + line.group(2): (int(line.group(3)), int(line.group(4))) for line in lines if line}


def _fullest(
    values: list[tuple[str, int, int, str]], spans: Mapping[str, tuple[int, int]]
) -> tuple[int, list[tuple[str, int, int, str]]]:
    """Bytes in use at the moment when most are, and what is alive then; what shares a place is one buffer."""
    moments = sorted({spans[name][0] for name, *_ in values if name in spans})
    best, chosen = 0, []
    for moment in moments:
        places: dict[tuple[int, int], tuple[str, int, int, str]] = {}
        for value in values:
            first, last = spans.get(value[0], (1, 0))
            if first <= moment <= last:
                places.setdefault(value[1:3], value)
        used = _union([(offset, offset + size) for size, offset in places])
        if used > best:
            best, chosen = used, list(places.values())
    return best, sorted(chosen, key=lambda value: -value[1])


def _union(intervals: list[tuple[int, int]]) -> int:
    total, end = 0, 0
    for first, last in sorted(intervals):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def _buffer(value: tuple[str, int, int, str], optimised: Program) -> Buffer:
    name = value[0].partition("{")[0]
    makers = [body[name] for body in optimised.computations.values() if name in body]
    return Buffer(
        bytes=value[1],
        array=value[3].partition("{")[0].removeprefix("("),  # the first of several
        made_by=(makers[0].op_name if makers else "") or name,
    )
