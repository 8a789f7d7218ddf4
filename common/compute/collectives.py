"""Counts the collectives of a partitioned program: how much they send, and along which axes of the mesh.

Counts the program as the partitioner left it, with each loop as often as it runs. There a reduce-scatter is still an
all-reduce of which each device keeps its own slice; later the compiler may or may not make it a real reduce-scatter.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from common.compute.hlo import Instruction, Program, integers

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_REARRANGING = ("bitcast", "reshape", "copy", "transpose", "get-tuple-element")
"""Opcodes that pass on all values of their operand."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind along the same axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which the members of a group differ."""
    group: int
    """How many devices are in one group."""
    times: int
    """How often one device takes part in one, per step."""
    bytes: int
    """Size of the whole arrays (after a gather, or before a scatter), summed over `times`."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends around a ring of n devices: (n - 1) / n of an array, twice that for an all-reduce
        (a reduce-scatter and an all-gather), and all of it for a permutation."""
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """Returns the collectives of a partitioned program, most bytes sent first; `mesh` has each axis's size, in order.

    Raises ValueError for device groups in an unknown notation, and for loops without a constant bound.
    """
    devices = math.prod(mesh.values())
    sums: dict[tuple[str, tuple[str, ...], int], tuple[int, int]] = {}
    for name, runs in program.runs().items():
        for kind, groups, size in _collectives_of(program, name, devices):
            if axes := axes_of(groups, mesh):
                key = kind, axes, groups.shape[1]
                times, total = sums.get(key, (0, 0))
                sums[key] = times + runs, total + runs * size
    found = [
        Collective(kind=kind, axes=axes, group=group, times=times, bytes=total)
        for (kind, axes, group), (times, total) in sums.items()
    ]
    return sorted(found, key=lambda collective: -collective.sent_bytes)


def as_compiled(requested: Sequence[Collective], scattered: int, summed: int) -> list[Collective]:
    """Returns the collectives as the optimised program runs them.

    It reduce-scatters `scattered` bytes (see `scattered_bytes`), and gathers all but `summed` bytes (see
    `summed_gather_bytes`); the other reduce-scatters and all-gathers that the partitioned program requests become
    all-reduces, which send twice as much.
    """
    gathers = sum(collective.bytes for collective in requested if collective.kind == "all-gather")
    kept = {
        "reduce-scatter": min(1.0, scattered / max(reduce_scatter_bytes(requested), 1)),
        "all-gather": max(0.0, 1 - summed / max(gathers, 1)),
    }
    compiled = []
    for collective in requested:
        all_reduced = round(collective.bytes * (1 - kept.get(collective.kind, 1.0)))
        compiled.append(dataclasses.replace(collective, bytes=collective.bytes - all_reduced))
        if all_reduced:
            compiled.append(dataclasses.replace(collective, kind="all-reduce", bytes=all_reduced))
    return compiled


def reduce_scatter_bytes(requested: Sequence[Collective]) -> int:
    """Returns the size of the whole arrays that a partitioned program requests to reduce-scatter."""
    return sum(collective.bytes for collective in requested if collective.kind == "reduce-scatter")


def scattered_bytes(optimised: Program) -> int:
    """Returns the size of the whole arrays that an optimised program really reduce-scatters in a step.

    libtpu fuses such an all-reduce with its slice, into a fusion named all-reduce-scatter.
    """
    total = 0
    for name, times in optimised.runs().items():
        fused = name.startswith("all-reduce-scatter")
        for instruction in optimised.computations[name].values():
            if instruction.opcode == "reduce-scatter" or (fused and instruction.opcode == "all-reduce"):
                total += times * _operand_bytes(instruction, optimised.computations[name])
    return total


def summed_gather_bytes(optimised: Program) -> int:
    """Returns the size of the whole arrays that an optimised program gathers by an all-reduce in a step.

    Each device then fills an array with zeros, writes its own shard into it, and all devices sum:

        %own = bf16[64,8] dynamic-update-slice(%zeros, %shard, %place, %zero)
        %whole = bf16[64,8] all-reduce(%own)
    """
    total = 0
    for name, times in optimised.runs().items():
        body = optimised.computations[name]
        for instruction in body.values():
            if instruction.opcode.removesuffix("-start") == "all-reduce":
                operands = [body[operand] for operand in instruction.operands]
                padded = [operand for operand in operands if _maker(optimised, operand) == "dynamic-update-slice"]
                total += times * sum(array.bytes for operand in padded for array in operand.arrays)
    return total


def _maker(program: Program, instruction: Instruction) -> str:
    """The opcode that computes a result, inside fusions."""
    if instruction.opcode != "fusion":
        return instruction.opcode
    return _maker(program, program.root(instruction.called[0]))


def groups_of(attributes: str, devices: int) -> np.ndarray:
    """Parses the device groups in an instruction's attributes, [groups, members]; for a permutation (source, target).

    Raises ValueError for an unknown notation.

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
    """Returns the mesh axes along which members of some group differ.

    >>> axes_of(np.array([[0, 2], [1, 3]]), {"fsdp": 2, "tensor": 2})
    ('fsdp',)
    """
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(axis for axis, place in zip(mesh, places, strict=True) if (place != place[:, :1]).any())


def _device_ids(order: str, devices: int) -> np.ndarray:
    """The device ids of a mesh in order: counted up if `order` is empty, a transposed box `[2,4]T(1,0)`, or a list."""
    box = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if not box:
        return np.array(integers(order)) if order else np.arange(devices)
    ids = np.arange(devices).reshape(integers(box.group(1)))
    return (ids.transpose(integers(box.group(2))) if box.group(2) else ids).reshape(-1)


def _named_groups(sizes: str, axes: str) -> np.ndarray:
    """Groups of places in a named mesh: `sizes` as `'a'=4,'b'=2`, `axes` as `'a','b'`.

    An axis may be a factor of a mesh axis: `'a':(2)2` is the one of size 2 after a more major factor of size 2.
    """
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


def _collectives_of(program: Program, name: str, devices: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yields (kind, groups, bytes of whole arrays) for each collective in a computation."""
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
    """Bytes that a device keeps of a result: its slice if every use takes a dynamic slice, else all of it."""
    readers = list(_readers(program, computation, instruction))
    if readers and all(reader.opcode == "dynamic-slice" for _, reader in readers):
        return max(reader.arrays[0].bytes for _, reader in readers)
    if readers and all(reader.opcode in _REARRANGING for _, reader in readers):
        return sum(_kept_bytes(program, name, reader) for name, reader in readers)
    return sum(array.bytes for array in instruction.arrays)


def _readers(program: Program, computation: str, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
    """Yields the instructions that use a result, and their computations.

    If a called computation returns the result in a tuple, yields what takes that element of the call's result.
    """
    calls = program.calls.get(computation, [])
    for reader in program.users[computation].get(instruction.name, []):
        if not (reader.root and reader.opcode == "tuple" and calls):
            yield computation, reader
            continue
        index = reader.operands.index(instruction.name)
        for name, call in calls:
            for element in program.users[name].get(call.name, []):
                if element.opcode != "get-tuple-element" or f"index={index}" in element.rest.split(", "):
                    yield name, element
