"""Parses XLA's programs (HLO) as text: instructions, the bytes of their arrays, how often each computation runs.

A program is a list of computations, each a list of instructions. A loop (`while`) names two other computations:

    %condition (carry: (f32[8,8], u32[])) -> pred[] {
      %turn = u32[] get-tuple-element(%carry), index=1
      %limit = u32[] constant(12)
      ROOT %test = pred[] compare(%turn, %limit), direction=LT
    }
    ENTRY %main (y: f32[8,8]) -> f32[8,8] {
      %start = (f32[8,8], u32[]) tuple(%y, %zero)
      %loop = (f32[8,8], u32[]) while(%start), condition=%condition, body=%body
    }

Here `%loop` is an instruction's name, `while` its opcode, `(f32[8,8], u32[])` the type of its result, `%start` its
operand, and what follows are attributes.
"""

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
        """Size without padding."""
        return math.prod(self.shape) * self.item_bits // 8

    @property
    def padded_bytes(self) -> int:
        """Size with the padding that the tiles of its layout add.

        >>> Array("f32", (512, 32), "1,0:T(8,128)").padded_bytes == 4 * 512 * 128
        True
        """
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not self.shape:
            return self.bytes
        sizes = [self.shape[int(axis)] for axis in order.split(",")]  # the minor-most first
        for i, part in enumerate(reversed(integers(tile.group(1)))):
            if i < len(sizes):
                sizes[i] = -(-sizes[i] // part) * part
        return math.prod(sizes) * self.item_bits // 8

    @property
    def in_hbm(self) -> bool:
        """Whether it is in main memory (HBM), not in a faster one such as `S(1)`."""
        return "S(" not in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: its name, what it does (opcode), the arrays of its result and the names of its operands."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    """Attributes, metadata and backend configuration; for constants and parameters first `(value)` or `(number)`."""
    root: bool
    """Whether its result is that of its computation."""

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that it runs."""
        branches = _BRANCHES.search(self.rest)
        return (*_CALLED.findall(self.rest), *(_NAME.findall(branches.group(1)) if branches else ()))

    @property
    def op_name(self) -> str:
        """The operation of the Python program that it comes from, or an empty string."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1).replace("\\'", "'") if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A whole program; it starts with the computation `entry`."""

    entry: str
    computations: dict[str, dict[str, Instruction]]
    """The instructions of each computation; both by name."""

    def runs(self) -> dict[str, int]:
        """Returns how often each computation that is used runs, from the constant bounds of loops.

        A computation that only says how to combine two numbers (`to_apply` of a reduction) counts once per use. Raises
        ValueError if the bound of a loop is not a constant.
        """
        totals: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            totals[name] = totals.get(name, 0) + times
            for instruction in self.computations[name].values():
                inner = times * (self._trip_count(name, instruction) if instruction.opcode == "while" else 1)
                for called in instruction.called:
                    if called in self.computations:
                        visit(called, inner)

        visit(self.entry, 1)
        return totals

    @functools.cached_property
    def users(self) -> dict[str, dict[str, list[Instruction]]]:
        """The instructions that use a result, by the names of the computation and of the instruction used."""
        found: dict[str, dict[str, list[Instruction]]] = {name: {} for name in self.computations}
        for name, body in self.computations.items():
            for instruction in body.values():
                for operand in instruction.operands:
                    found[name].setdefault(operand, []).append(instruction)
        return found

    def root(self, computation: str) -> Instruction:
        """Returns the instruction whose result is the computation's."""
        return next(instruction for instruction in self.computations[computation].values() if instruction.root)

    @functools.cached_property
    def calls(self) -> dict[str, list[tuple[str, Instruction]]]:
        """For each computation that is called: the calling computations' names and the `call` instructions."""
        found: dict[str, list[tuple[str, Instruction]]] = {}
        for name, body in self.computations.items():
            for instruction in body.values():
                if instruction.opcode == "call":
                    found.setdefault(instruction.called[0], []).append((name, instruction))
        return found

    def _trip_count(self, computation: str, loop: Instruction) -> int:
        """Returns how often a loop's body runs; the loop must count up by a constant to a constant.

        It may be an attribute: `while(%start), backend_config={"known_trip_count":{"n":"12"}}`. If not, the condition
        has the bound, and names the element of the carried tuple that counts:

            %turn = u32[] get-tuple-element(%carry), index=1
            ROOT %test = pred[] compare(%turn, %limit), direction=LT
        """
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
        index = int(_attribute(counter, "index"))
        distance = bound - self._counter_start(computation, loop, index)
        return max(0, -(-distance // self._counter_step(_attribute(loop, "body"), index)))

    def _counter_start(self, computation: str, loop: Instruction, index: int) -> int:
        """Returns where a loop's counter, element `index` of its operand, starts.

        It is 0 unless the compiler peeled off the first iterations; with two peeled, the operand is

            %two = u32[] constant(2)
            %start = (f32[8,8], u32[]) tuple(%y, %two)
            %loop = (f32[8,8], u32[]) while(%start), condition=%condition, body=%body
        """
        body = self.computations[computation]
        carry = _origin(body, loop.operands[0])
        if carry is None or carry.opcode != "tuple":
            return 0
        return _constant(_origin(body, carry.operands[index])) or 0

    def _counter_step(self, name: str, index: int) -> int:
        """Returns by how much the loop body `name` raises the counter, element `index` of its result.

        It is 1, except in loops into which the partitioner splits a matrix product: they do two turns at once, and the
        constants of a chain of additions sum up to the step:

            %next = u32[] add(%turn, %one)
            %after = u32[] add(%one, %next)
            ROOT %out = (f32[8,8], u32[]) tuple(%product, %after)
        """
        body, root = self.computations[name], self.root(name)
        raised = _origin(body, root.operands[index]) if root.opcode == "tuple" else None
        step = 0
        while raised is not None and raised.opcode == "add":
            constants = [_constant(_origin(body, operand)) for operand in raised.operands]
            if not any(constants):
                break
            step += next(constant for constant in constants if constant)
            raised = _origin(body, raised.operands[0 if constants[1] else 1])
        return step or 1


def parse(text: str) -> Program:
    """Parses the text of `compiled.as_text()`, or of a file that `--xla_dump_hlo_as_text` wrote.

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
            if instruction := _parse_instruction(line):
                for operand in instruction.operands:
                    if "#" in operand and operand not in current:
                        current[operand] = _element(operand, current)
                current[instruction.name] = instruction
        elif header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
    return Program(entry, computations)


def parse_lowered(lowered: Any) -> Program:
    """Parses the program of `jax.jit(...).lower(...)`, before any backend has optimised it.

    >>> import jax, jax.numpy as jnp
    >>> program = parse_lowered(jax.jit(jnp.dot).lower(jnp.ones((3, 5)), jnp.ones((5, 7))))
    >>> [instruction.opcode for instruction in program.computations[program.entry].values()]
    ['parameter', 'parameter', 'dot']
    """
    return parse(lowered.compiler_ir("hlo").as_hlo_module().to_string())


def arrays_of(text: str) -> tuple[Array, ...]:
    """Returns all arrays of a type, which may be a tuple.

    >>> [array.bytes for array in arrays_of("(s32[], bf16[8,2]{1,0:T(8,128)(2,1)})")]
    [4, 32]
    """
    return tuple(Array(dtype, integers(shape), layout) for dtype, shape, layout in _ARRAY.findall(text))


def _parse_instruction(line: str) -> Instruction | None:
    """Parses a line such as `  ROOT %sum = f32[8]{0} add(%x, %y), metadata=...`; None if it has another form."""
    start = _START.match(line)
    if not start:
        return None
    after_equals = line[start.end() :]
    if after_equals.startswith("("):
        result_type, line = _split_parentheses(after_equals)
    else:
        result_type, _, line = after_equals.partition(" ")
    opcode, _, line = line.lstrip().partition("(")
    inside, rest = _split_parentheses("(" + line)
    operands = tuple(_NAME.findall(inside))
    if opcode in ("constant", "parameter"):
        operands, rest = (), inside + rest
    return Instruction(start.group(2), opcode, arrays_of(result_type), operands, rest, bool(start.group(1)))


def _attribute(instruction: Instruction, name: str) -> str:
    """The value of an attribute such as `index=1` or `body=%body`."""
    found = re.search(rf"\b{name}=%?([\w.-]+)", instruction.rest)
    assert found, instruction.rest
    return found.group(1)


def _origin(body: dict[str, Instruction], name: str) -> Instruction | None:
    """The instruction that computes `name`, looking through copies and bitcasts; None if it is not in `body`."""
    found = body.get(name)
    while found is not None and found.opcode in ("bitcast", "copy"):
        found = body.get(found.operands[0])
    return found


def _constant(instruction: Instruction | None) -> int | None:
    """The value of an integer constant; None for anything else."""
    if instruction is None or instruction.opcode != "constant":
        return None
    value = re.match(r"\((\d+)\)", instruction.rest)
    return int(value.group(1)) if value else None


def _element(name: str, body: dict[str, Instruction]) -> Instruction:
    """The `get-tuple-element` instruction that newer XLA abbreviates as the operand `tuple#1`."""
    whole, _, index = name.partition("#")
    arrays = body[whole].arrays[int(index) : int(index) + 1]
    return Instruction(name, "get-tuple-element", arrays, (whole,), f", index={index}", root=False)


def _split_parentheses(text: str) -> tuple[str, str]:
    """Splits a text that starts with a parenthesis after the one that closes it."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def integers(text: str) -> tuple[int, ...]:
    """Parses integers separated by commas, as in shapes and groups.

    >>> integers("8,128"), integers("")
    ((8, 128), ())
    """
    return tuple(int(number) for number in text.split(",") if number)
