"""What a partitioned program sends between devices, and along which axes of the mesh.

Counted in the program as the partitioner left it, each loop as often as it runs. There a reduce-scatter still is an
all-reduce of which every device keeps its own slice; the compiler may turn it into a real one later, or may not.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from common.compute.hlo import Instruction, Program, integers

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_THROUGH = ("bitcast", "reshape", "copy", "transpose", "get-tuple-element")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind along the same axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the members of a group differ."""
    group: int
    """Devices of a group."""
    times: int
    bytes: int
    """Of whole arrays (as gathered, or before they are scattered), summed over `times`."""

    @property
    def sent_bytes(self) -> float:
        """What one device sends, by a ring: an array's (n - 1) / n for n members, twice that for an all-reduce, and
        all of it for a permutation."""
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Of a program after partitioning, the largest first; `mesh` has the size of every axis, in order.

    Raises ValueError for groups in an unknown notation, and for loops that have no constant bound.
    """
    devices = math.prod(mesh.values())
    sums: dict[tuple[str, tuple[str, ...], int], tuple[int, int]] = {}
    for name, runs in program.runs().items():
        for kind, groups, size in _in_computation(program, name, devices):
            if axes := axes_of(groups, mesh):
                key = kind, axes, groups.shape[1]
                times, total = sums.get(key, (0, 0))
                sums[key] = times + runs, total + runs * size
    found = [
        Collective(kind=kind, axes=axes, group=group, times=times, bytes=total)
        for (kind, axes, group), (times, total) in sums.items()
    ]
    return sorted(found, key=lambda collective: -collective.sent_bytes)


def as_compiled(asked: Sequence[Collective], scattered: int) -> list[Collective]:
    """The same with the part of the reduce-scatters that an optimised program does not do (see `scattered_bytes`) as
    all-reduces, which send twice as much."""
    kept = min(1.0, scattered / max(wanted_bytes(asked), 1))
    done = []
    for collective in asked:
        if collective.kind == "reduce-scatter":
            whole = round(collective.bytes * (1 - kept))
            done.append(dataclasses.replace(collective, bytes=collective.bytes - whole))
            done.append(dataclasses.replace(collective, kind="all-reduce", bytes=whole))
        else:
            done.append(collective)
    return done


def wanted_bytes(asked: Sequence[Collective]) -> int:
    """Of whole arrays to be reduced and scattered."""
    return sum(collective.bytes for collective in asked if collective.kind == "reduce-scatter")


def scattered_bytes(optimised: Program) -> int:
    """Bytes of whole arrays that an optimised program really reduces and scatters in a step.

    libtpu makes a fusion of the name all-reduce-scatter of such an all-reduce and its slice.
    """
    total = 0
    for name, times in optimised.runs().items():
        fused = name.startswith("all-reduce-scatter")
        for instruction in optimised.computations[name].values():
            if instruction.opcode == "reduce-scatter" or (fused and instruction.opcode == "all-reduce"):
                total += times * _operand_bytes(instruction, optimised.computations[name])
    return total


def groups_of(attributes: str, devices: int) -> np.ndarray:
    """Members of each group, [groups, members], from an instruction's attributes; of a permutation, pairs.

    >>> groups_of("replica_groups={{0,2},{1,3}}", 4).tolist()
    [[0, 2], [1, 3]]
    >>> groups_of("replica_groups=[2,2]<=[2,2]T(1,0)", 4).tolist()
    [[0, 2], [1, 3]]
    >>> groups_of("replica_groups=mesh['a'=2,'b'=2] {'a'}", 4).tolist()
    [[0, 2], [1, 3]]
    >>> groups_of("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", 4).tolist()
    [[0, 1], [2, 3]]
    >>> groups_of("source_target_pairs={{0,1},{1,0}}", 2).tolist()
    [[0, 1], [1, 0]]
    >>> groups_of("replica_groups={}", 2).tolist()
    [[0, 1]]
    """
    if pairs := re.search(r"(?:source_target_pairs|replica_groups)=\{((?:\{[\d,]*\},?)*)\}", attributes):
        listed = [integers(group) for group in re.findall(r"\{([\d,]*)\}", pairs.group(1))]
        return np.array(listed or [tuple(range(devices))])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, box, turned = (integers(part or "") for part in iota.groups())
        ids = np.arange(devices).reshape(box)
        return (ids.transpose(turned) if turned else ids).reshape(shape)
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", attributes):
        sizes, order, axes = named.groups()
        return _device_ids(order or "", devices)[_named_groups(sizes, axes)]
    raise ValueError(f"groups of devices in an unknown notation: {attributes[:200]}")


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which members of some group differ.

    >>> axes_of(np.array([[0, 2], [1, 3]]), {"fsdp": 2, "tensor": 2})
    ('fsdp',)
    """
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if (place != place[:, :1]).any())


def _device_ids(order: str, devices: int) -> np.ndarray:
    """Devices in the order of a mesh: in a row, a transposed box `[2,4]T(1,0)`, or listed."""
    box = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if not box:
        return np.array(integers(order)) if order else np.arange(devices)
    ids = np.arange(devices).reshape(integers(box.group(1)))
    return (ids.transpose(integers(box.group(2))) if box.group(2) else ids).reshape(-1)


def _named_groups(sizes: str, axes: str) -> np.ndarray:
    """`'a'=4,'b'=2` and `'a','b'`; an axis may be a part of one, as `'a':(2)2` for the minor half of it."""
    whole = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    shape: list[int] = []
    member: list[bool] = []
    parts = {
        name: (int(before), int(size)) if size else (1, whole[name])
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)
    }
    for name, size in whole.items():
        before, part = parts.get(name, (size, 1))
        shape += [before, part, size // (before * part)]
        member += [False, name in parts, False]
    ids = np.arange(math.prod(shape)).reshape(shape)
    inside = [i for i, is_member in enumerate(member) if is_member]
    outside = [i for i, is_member in enumerate(member) if not is_member]
    return ids.transpose(*outside, *inside).reshape(-1, math.prod(shape[i] for i in inside))


def _in_computation(program: Program, name: str, devices: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """(kind, groups, bytes of whole arrays) of each collective."""
    body = program.computations[name]
    for instruction in body.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            groups = groups_of(instruction.rest, devices)
            members, operand = groups.shape[1], _operand_bytes(instruction, body)
            if kind == "all-reduce" and operand == members * _kept_bytes(program, name, instruction):
                kind = "reduce-scatter"
            yield kind, groups, operand * members if kind == "all-gather" else operand


def _operand_bytes(instruction: Instruction, body: dict[str, Instruction]) -> int:
    return sum(array.bytes for operand in instruction.operands for array in body[operand].arrays)


def _kept_bytes(program: Program, computation: str, instruction: Instruction) -> int:
    """Of the result, where every device slices its own part out of it; else all of it."""
    readers = list(_readers(program, computation, instruction))
    if readers and all(reader.opcode == "dynamic-slice" for _, reader in readers):
        return max(reader.arrays[0].bytes for _, reader in readers)
    if readers and all(reader.opcode in _THROUGH for _, reader in readers):
        return sum(_kept_bytes(program, name, reader) for name, reader in readers)
    return sum(array.bytes for array in instruction.arrays)


def _readers(program: Program, computation: str, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
    """What uses a result, and in which computation: where a call gives it back, whoever takes it from there."""
    calls = program.calls.get(computation, [])
    for reader in program.users[computation].get(instruction.name, []):
        if not (reader.root and reader.opcode == "tuple" and calls):
            yield computation, reader
            continue
        place = reader.operands.index(instruction.name)
        for name, call in calls:
            for element in program.users[name].get(call.name, []):
                if element.opcode != "get-tuple-element" or f"index={place}" in element.rest.split(", "):
                    yield name, element
