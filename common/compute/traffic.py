"""Counts what a program computes and what it moves through main memory, with each loop as often as it runs."""

import math
import re

from common.compute.hlo import Array, Instruction, Program, integers

_FREE = frozenset(
    "after-all bitcast call conditional constant get-tuple-element opt-barrier parameter partition-id replica-id tuple "
    "while".split()
)
"""Opcodes that move nothing: they pass results on, or run computations that are counted by themselves."""
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
"""Reserves memory without writing to it."""
_FUSED = (
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
"""Opcodes whose inner computations stay in registers or in faster memory."""
_SLICES = ("slice", "dynamic-slice")


def product_flops(program: Program) -> int:
    """Returns the FLOPs of all matrix products on one device in a step, 2 per multiply-add, recomputed ones included.

    `program` must not be optimised by a backend yet (lowered, or partitioned): there every product is a `dot`, which
    TPU's compiler turns into convolutions and GPU's into library calls. Products inside kernels are not counted.

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
    """Returns the bytes that one device reads from and writes to main memory (HBM) in a step.

    Every instruction reads its operands and writes its result. A fusion does so once, whatever it contains: it is one
    kernel. If it only slices an operand, it reads the slice, and if it updates one in place, it writes the update.
    Arrays in faster memory do not count, nor does what a network writes.
    """
    total = 0
    for name, times in _kernel_runs(optimised).items():
        body = optimised.computations[name]
        total += times * sum(_traffic(optimised, instruction, body) for instruction in body.values())
    return total


def _kernel_runs(program: Program) -> dict[str, int]:
    """As `Program.runs`, without computations that are inside one instruction, such as those of fusions."""
    inner = {
        called
        for body in program.computations.values()
        for instruction in body.values()
        if instruction.opcode in _FUSED or instruction.opcode.startswith("async")
        for called in instruction.called
    }
    return {name: times for name, times in program.runs().items() if name not in inner}


def _traffic(program: Program, instruction: Instruction, body: dict[str, Instruction]) -> int:
    """Bytes that one instruction moves."""
    if instruction.opcode in _FREE or _ALLOCATION in instruction.rest:
        return 0
    operands = [body[name] for name in instruction.operands if name in body]
    if instruction.opcode.endswith("-done"):
        return _hbm_bytes(instruction.arrays)  # what was read is counted at the start
    if instruction.opcode == "async-update":  # hands further operands to the computation that its first operand started
        return sum(_hbm_bytes(operand.arrays) for operand in operands[1:])
    if instruction.opcode in _SLICES:
        return 2 * _hbm_bytes(instruction.arrays)
    if instruction.opcode == "async-start" and (read := _async_slice_bytes(program, instruction, operands)):
        return read
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _hbm_bytes(operands[1].arrays)
    if instruction.opcode == "fusion":
        return _fusion_traffic(program, instruction, operands)
    written = 0 if instruction.opcode.endswith("-start") else _hbm_bytes(instruction.arrays)
    return written + sum(_hbm_bytes(operand.arrays) for operand in operands)


def _async_slice_bytes(program: Program, start: Instruction, operands: list[Instruction]) -> int:
    """Bytes that an asynchronous computation reads if it is a single slice, else 0."""
    root = program.root(start.called[0])
    return _padded_share(operands[0], root.arrays[0]) if root.opcode in _SLICES else 0


# The rest was written for fusions that contain fusions, as TPU's compiler nests them in a loop over layers. This one
# reads one of 24 layers from a stack %p0, and writes its result into one layer of another stack %p3, in place:
#
#   %inner (q0: bf16[24,64,128], q1: s32[], q2: bf16[64,128]) -> bf16[64,128] {
#     %cast = bf16[24,64,128] bitcast(%q0)
#     %layer = bf16[1,64,128] dynamic-slice(%cast, %q1, %zero, %zero)
#     ...
#     ROOT %product = bf16[64,128] multiply(%shaped, %q2)
#   }
#   %written (r0: bf16[24,64,128], r1: bf16[64,128], r2: s32[]) -> bf16[24,64,128] {
#     %row = bf16[1,64,128] bitcast(%r1)
#     ROOT %new = bf16[24,64,128] dynamic-update-slice(%r0, %row, %r2, %zero, %zero)
#   }
#   %outer (p0: bf16[24,64,128], p1: s32[], p2: bf16[64,128], p3: bf16[24,64,128]) -> (bf16[24,64,128], bf16[64,128]) {
#     %x = bf16[64,128] fusion(%p0, %p1, %p2), calls=%inner
#     %stack = bf16[24,64,128] fusion(%p3, %x, %p1), calls=%written
#     ROOT %both = (bf16[24,64,128], bf16[64,128]) tuple(%stack, %x)
#   }
#
# Reading: `_bytes_read` follows %p0 to its reader %inner, there %q0 through the bitcast to the slice: one layer. %p3 is
# read by a dynamic-update-slice alone, which does not read what it updates: nothing.
# Writing: `_in_place_update` follows %stack to the root of %written, a dynamic-update-slice of %row: one layer.


def _fusion_traffic(program: Program, fusion: Instruction, operands: list[Instruction]) -> int:
    """Bytes that a fusion reads from its operands and writes to its results."""
    name = fusion.called[0]
    body = program.computations[name]
    total = sum(
        _bytes_read(program, name, _parameter(body, number), operand) for number, operand in enumerate(operands)
    )
    root = program.root(name)
    results = [body[result] for result in root.operands] if root.opcode == "tuple" else [root]
    for result, array in zip(results, fusion.arrays, strict=False):
        update = _in_place_update(program, body, result)
        whole = _hbm_bytes((array,))
        total += whole if update is None else whole * update.bytes // max(array.bytes, 1)
    return total


def _bytes_read(program: Program, computation: str, name: str, operand: Instruction) -> int:
    """Bytes of `operand`, an operand of a fusion, that a computation inside it reads; there its name is `name`.

    Adds up the slices that are taken of it, here and in inner fusions; any other use reads all of it.
    """
    whole, total = _hbm_bytes(operand.arrays), 0
    for reader in program.users[computation].get(name, []):
        if reader.opcode in _SLICES and reader.operands[0] == name:
            total += _padded_share(operand, reader.arrays[0])
        elif reader.opcode == "bitcast":
            total += _bytes_read(program, computation, reader.name, operand)
        elif reader.opcode == "fusion":
            inner = reader.called[0]
            for number, passed in enumerate(reader.operands):
                if passed == name:
                    parameter = _parameter(program.computations[inner], number)
                    total += _bytes_read(program, inner, parameter, operand)
        elif not (reader.opcode == "dynamic-update-slice" and reader.operands[0] == name):
            return whole
    return min(total, whole)


def _in_place_update(program: Program, body: dict[str, Instruction], result: Instruction) -> Array | None:
    """The part that is written of a result that is updated in place; None if all of the result is written."""
    if result.opcode == "bitcast" and result.operands[0] in body:
        return _in_place_update(program, body, body[result.operands[0]])
    if result.opcode == "fusion":
        inner = result.called[0]
        return _in_place_update(program, program.computations[inner], program.root(inner))
    return body[result.operands[1]].arrays[0] if result.opcode == "dynamic-update-slice" else None


def _parameter(body: dict[str, Instruction], number: int) -> str:
    """The name of a computation's parameter."""
    return next(one.name for one in body.values() if one.opcode == "parameter" and one.rest.startswith(f"({number})"))


def _padded_share(operand: Instruction, part: Array) -> int:
    """Bytes of a part of an operand, with the padding that the whole operand has."""
    return _hbm_bytes(operand.arrays) * part.bytes // max(sum(array.bytes for array in operand.arrays), 1)


def _hbm_bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.padded_bytes for array in arrays if array.in_hbm)
