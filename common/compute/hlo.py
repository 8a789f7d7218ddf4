"""XLA's programs as text: instructions, the bytes of their arrays, and how often each computation runs."""

import dataclasses
import functools
import math
import re
from typing import Any

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.-]+(?:#\d+)?)")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    layout: str
    """Minor-to-major order, tiles and memory space, as `1,0:T(8,128)S(1)`; empty in programs without layouts."""

    @property
    def item_bits(self) -> int:
        """
        >>> [Array(dtype, (), "").item_bits for dtype in ("pred", "bf16", "f8e4m3fn", "token")]
        [8, 16, 8, 0]
        """
        bits = re.search(r"\d+", self.dtype)
        return 8 if self.dtype == "pred" else int(bits.group()) if bits else 0

    @property
    def bytes(self) -> int:
        """Without padding."""
        return math.prod(self.shape) * self.item_bits // 8

    @property
    def padded_bytes(self) -> int:
        """With what the tiles of its layout add.

        >>> Array("f32", (512, 32), "1,0:T(8,128)").padded_bytes == 4 * 512 * 128
        True
        """
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not self.shape:
            return self.bytes
        sizes = [self.shape[int(axis)] for axis in order.split(",")]  # the minor one first
        for i, part in enumerate(reversed(integers(tile.group(1)))):
            if i < len(sizes):
                sizes[i] = -(-sizes[i] // part) * part
        return math.prod(sizes) * self.item_bits // 8

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the main memory, and not in a faster one (`S(1)`)."""
        return "S(" not in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    """Attributes, metadata and backend configuration; a constant's value in parentheses before them."""
    root: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        branches = _BRANCHES.search(self.rest)
        return (*_CALLED.findall(self.rest), *(_NAME.findall(branches.group(1)) if branches else ()))

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from, or nothing."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1).replace("\\'", "'") if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    entry: str
    computations: dict[str, dict[str, Instruction]]
    """Instructions by name, of each computation by name."""

    def runs(self) -> dict[str, int]:
        """How often each computation runs in a step, from loops' constant bounds; without those that never run.

        What only tells other instructions how to combine two numbers (`to_apply`) is counted once a use.
        Raises ValueError where the bound of a loop is not a constant.
        """
        totals: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            totals[name] = totals.get(name, 0) + times
            for instruction in self.computations[name].values():
                inner = times * (self._trips(name, instruction) if instruction.opcode == "while" else 1)
                for called in instruction.called:
                    if called in self.computations:
                        visit(called, inner)

        visit(self.entry, 1)
        return totals

    @functools.cached_property
    def users(self) -> dict[str, dict[str, list[Instruction]]]:
        """By the name of what is used, of each computation by name."""
        found: dict[str, dict[str, list[Instruction]]] = {name: {} for name in self.computations}
        for name, body in self.computations.items():
            for instruction in body.values():
                for operand in instruction.operands:
                    found[name].setdefault(operand, []).append(instruction)
        return found

    def root(self, computation: str) -> Instruction:
        """What it gives back."""
        return next(instruction for instruction in self.computations[computation].values() if instruction.root)

    @functools.cached_property
    def calls(self) -> dict[str, list[tuple[str, Instruction]]]:
        """By the name of a computation that is run by calls, these and the computations that they are in."""
        found: dict[str, list[tuple[str, Instruction]]] = {}
        for name, body in self.computations.items():
            for instruction in body.values():
                if instruction.opcode == "call":
                    found.setdefault(instruction.called[0], []).append((name, instruction))
        return found

    def _trips(self, computation: str, loop: Instruction) -> int:
        """Of a loop that counts up to a constant by a constant."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        name = _attribute(loop, "condition")
        condition, test = self.computations[name], self.root(name)
        bound = _constant(_origin(condition, test.operands[1])) if test.opcode == "compare" else None
        if bound is None or "direction=LT" not in test.rest:
            raise ValueError(f"the bound of loop {loop.name} is not a constant: {test}")
        counter = _origin(condition, test.operands[0])
        assert counter is not None, test
        place = int(_attribute(counter, "index"))
        steps = bound - self._first(computation, loop, place)
        return max(0, -(-steps // self._step(_attribute(loop, "body"), place)))

    def _first(self, computation: str, loop: Instruction, place: int) -> int:
        """Where the loop begins to count: 0, but for a loop whose first turns were taken out of it."""
        body = self.computations[computation]
        carry = _origin(body, loop.operands[0])
        if carry is None or carry.opcode != "tuple":
            return 0
        return _constant(_origin(body, carry.operands[place])) or 0

    def _step(self, name: str, place: int) -> int:
        """By how much the loop counts: 1, but for products that the partitioner has cut up, which take several turns at
        once."""
        body, root = self.computations[name], self.root(name)
        now = _origin(body, root.operands[place]) if root.opcode == "tuple" else None
        step = 0
        while now is not None and now.opcode == "add":
            numbers = [_constant(_origin(body, operand)) for operand in now.operands]
            if not any(numbers):
                break
            step += next(number for number in numbers if number)
            now = _origin(body, now.operands[0 if numbers[1] else 1])
        return step or 1


def parse(text: str) -> Program:
    """The program of `compiled.as_text()`, or of a file that `--xla_dump_hlo_as_text` wrote.

    >>> import jax, jax.numpy as jnp
    >>> turns = lambda x: jax.lax.scan(lambda y, _: (jnp.sin(y) @ y, None), x, length=5)[0]
    >>> program = parse(jax.jit(turns).lower(jnp.ones((3, 3))).compile().as_text())
    >>> max(program.runs().values()) >= 5
    True
    """
    entry = ""
    current: dict[str, Instruction] = {}
    computations: dict[str, dict[str, Instruction]] = {}
    for line in text.splitlines():
        if line.startswith((" ", "\t")):
            if instruction := _instruction(line):
                for operand in instruction.operands:
                    if "#" in operand and operand not in current:
                        current[operand] = _element(operand, current)
                current[instruction.name] = instruction
        elif header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
    return Program(entry, computations)


def parse_lowered(lowered: Any) -> Program:
    """The program of `jax.jit(...).lower(...)`, as XLA is given it: no backend has chosen its own instructions yet.

    >>> import jax, jax.numpy as jnp
    >>> program = parse_lowered(jax.jit(jnp.dot).lower(jnp.ones((3, 5)), jnp.ones((5, 7))))
    >>> [instruction.opcode for instruction in program.computations[program.entry].values()]
    ['parameter', 'parameter', 'dot']
    """
    return parse(lowered.compiler_ir("hlo").as_hlo_module().to_string())


def arrays_of(text: str) -> tuple[Array, ...]:
    """All arrays of a type, which may be a tuple.

    >>> [array.bytes for array in arrays_of("(s32[], bf16[8,2]{1,0:T(8,128)(2,1)})")]
    [4, 32]
    """
    return tuple(Array(dtype, integers(shape), layout) for dtype, shape, layout in _ARRAY.findall(text))


def _instruction(line: str) -> Instruction | None:
    start = _START.match(line)
    if not start:
        return None
    kind, line = _until_close(line[start.end() :]) if line[start.end()] == "(" else _until(line[start.end() :], " ")
    opcode, line = _until(line.lstrip(), "(")
    inside, rest = _until_close("(" + line)
    operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
    if opcode in ("constant", "parameter"):
        rest = inside + rest
    return Instruction(start.group(2), opcode, arrays_of(kind), operands, rest, bool(start.group(1)))


def _attribute(instruction: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.-]+)", instruction.rest)
    assert found, instruction.rest
    return found.group(1)


def _origin(body: dict[str, Instruction], name: str) -> Instruction | None:
    """What is copied, perhaps several times, to be `name`."""
    found = body.get(name)
    while found is not None and found.opcode in ("bitcast", "copy"):
        found = body.get(found.operands[0])
    return found


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.match(r"\((\d+)\)", instruction.rest)
    return int(value.group(1)) if value else None


def _element(name: str, body: dict[str, Instruction]) -> Instruction:
    """`tuple#1`, as newer XLA writes an element of a tuple, as the instruction that older ones have for it."""
    whole, _, place = name.partition("#")
    arrays = body[whole].arrays[int(place) : int(place) + 1]
    return Instruction(name, "get-tuple-element", arrays, (whole,), f", index={place}", root=False)


def _until(text: str, mark: str) -> tuple[str, str]:
    head, _, tail = text.partition(mark)
    return head, tail


def _until_close(text: str) -> tuple[str, str]:
    """What the parenthesis at the beginning encloses, with it, and what follows."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def integers(text: str) -> tuple[int, ...]:
    """Of a list with commas, as shapes and groups have them."""
    return tuple(int(number) for number in text.split(",") if number)
