"""What a compiled program computes and what it moves through main memory, each loop counted as often as it runs."""

import math
import re

from common.compute.hlo import Array, Instruction, Program, integers

_FREE = frozenset(
    "after-all bitcast call conditional constant get-tuple-element opt-barrier parameter partition-id replica-id tuple "
    "while".split()
)
"""They only pass on what others have made, or lead to computations that are counted by themselves."""
_UNWRITTEN = 'custom_call_target="AllocateBuffer"'
"""Room that others fill."""
_ONCE = (
    "fusion",
    "reduce",
    "sort",
    "scatter",
    "map",
    "reduce-window",
    "select-and-scatter",
    "all-reduce",
    "custom-call",
)
"""Their inner computations stay in registers or in faster memory."""
_SLICES = ("slice", "dynamic-slice")


def product_flops(program: Program) -> int:
    """FLOPs of all matrix products that one device does in a step, 2 a multiply-add, recomputed ones included.

    Counts a program that no backend has optimised yet (lowered, or partitioned), where every product is a `dot`: TPU's
    compiler makes convolutions of them, GPU's makes calls of libraries. Products within kernels are not seen.

    >>> import jax, jax.numpy as jnp
    >>> from common.compute.hlo import parse_lowered
    >>> turns = lambda x: jax.lax.scan(lambda y, _: (y @ y, None), x, length=5)[0]
    >>> product_flops(parse_lowered(jax.jit(turns).lower(jnp.ones((3, 3))))) == 5 * 2 * 3**3
    True
    """
    total = 0
    for name, times in program.runs().items():
        body = program.computations[name]
        for dot in body.values():
            if dot.opcode == "dot":
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)
                left = body[dot.operands[0]].arrays[0].shape
                depth = math.prod(left[axis] for axis in integers(contracted.group(1) if contracted else ""))
                total += 2 * times * depth * math.prod(dot.arrays[0].shape)
    return total


def memory_traffic(optimised: Program) -> int:
    """Bytes that one device reads from and writes to main memory (HBM) in a step, as the compiler has laid them out.

    Every instruction reads its operands and writes its result, a fusion once for all that is in it, other fusions
    among it; of what a fusion only slices, the slice is read, and of what it updates in place, the update is written.
    What lies in faster memory is not counted, nor is what a network moves there.
    """
    total = 0
    for name, times in _outer_runs(optimised).items():
        body = optimised.computations[name]
        total += times * sum(_moved(optimised, instruction, body) for instruction in body.values())
    return total


def _outer_runs(program: Program) -> dict[str, int]:
    """As `runs`, of computations that are no part of one instruction."""
    inner = {
        called
        for body in program.computations.values()
        for instruction in body.values()
        if instruction.opcode in _ONCE or instruction.opcode.startswith("async")
        for called in instruction.called
    }
    return {name: times for name, times in program.runs().items() if name not in inner}


def _moved(program: Program, instruction: Instruction, body: dict[str, Instruction]) -> int:
    if instruction.opcode in _FREE or _UNWRITTEN in instruction.rest:
        return 0
    operands = [body[name] for name in instruction.operands if name in body]
    if instruction.opcode.endswith("-done"):
        return _hbm_bytes(instruction.arrays)  # what the start read was counted with it
    if instruction.opcode == "async-update":  # hands further operands to what its first one has started
        return sum(_hbm_bytes(operand.arrays) for operand in operands[1:])
    if instruction.opcode in _SLICES:
        return 2 * _hbm_bytes(instruction.arrays)
    if instruction.opcode == "async-start" and (sliced := _sliced(program, instruction, operands)):
        return sliced
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _hbm_bytes(operands[1].arrays)
    if instruction.opcode == "fusion":
        return _moved_by_fusion(program, instruction, operands)
    written = 0 if instruction.opcode.endswith("-start") else _hbm_bytes(instruction.arrays)
    return written + sum(_hbm_bytes(operand.arrays) for operand in operands)


def _sliced(program: Program, start: Instruction, operands: list[Instruction]) -> int:
    """What is read of the operands where all that runs in the background is one slice."""
    root = program.root(start.called[0])
    return _share(operands[0], root.arrays[0]) if root.opcode in _SLICES else 0


def _moved_by_fusion(program: Program, fusion: Instruction, operands: list[Instruction]) -> int:
    name = fusion.called[0]
    inside = program.computations[name]
    total = sum(_read(program, name, _parameter(inside, place), operand) for place, operand in enumerate(operands))
    root = program.root(name)
    parts = [inside[part] for part in root.operands] if root.opcode == "tuple" else [root]
    for part, array in zip(parts, fusion.arrays, strict=False):
        update = _update(program, inside, part)
        whole = _hbm_bytes((array,))
        total += whole if update is None else whole * update.bytes // max(array.bytes, 1)
    return total


def _read(program: Program, computation: str, name: str, operand: Instruction) -> int:
    """Bytes of an operand that a fused computation, in which it has that name, reads: by fusions within it too."""
    whole, total = _hbm_bytes(operand.arrays), 0
    for reader in program.users[computation].get(name, []):
        if reader.opcode in _SLICES and reader.operands[0] == name:
            total += _share(operand, reader.arrays[0])
        elif reader.opcode == "bitcast":
            total += _read(program, computation, reader.name, operand)
        elif reader.opcode == "fusion":
            inner = reader.called[0]
            places = [place for place, given in enumerate(reader.operands) if given == name]
            names = [_parameter(program.computations[inner], place) for place in places]
            total += sum(_read(program, inner, its, operand) for its in names)
        elif not (reader.opcode == "dynamic-update-slice" and reader.operands[0] == name):
            return whole
    return min(total, whole)


def _update(program: Program, inside: dict[str, Instruction], result: Instruction) -> Array | None:
    """What is written of a result that is updated in place; None where all of it is."""
    if result.opcode == "bitcast" and result.operands[0] in inside:
        return _update(program, inside, inside[result.operands[0]])
    if result.opcode == "fusion":
        body = result.called[0]
        return _update(program, program.computations[body], program.root(body))
    return inside[result.operands[1]].arrays[0] if result.opcode == "dynamic-update-slice" else None


def _parameter(inside: dict[str, Instruction], place: int) -> str:
    return next(one.name for one in inside.values() if one.opcode == "parameter" and one.rest.startswith(f"({place})"))


def _share(operand: Instruction, part: Array) -> int:
    """Bytes of a part, with the padding of the whole."""
    return _hbm_bytes(operand.arrays) * part.bytes // max(sum(array.bytes for array in operand.arrays), 1)


def _hbm_bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.padded_bytes for array in arrays if array.in_hbm)
