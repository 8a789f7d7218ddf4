"""What XLA itself counts: the matrix products of a compiled program."""

import math
import re

# `%name = f32[2,3]{1,0} dot(%a, %b), ..., lhs_contracting_dims={1}, ...` in optimised HLO text.
_DEFINITION = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (\w+)\[([\d,]*)\]")
_DOT = re.compile(r" dot\((%[\w.-]+), (%[\w.-]+)\).*?lhs_contracting_dims=\{([\d,]*)\}")


def dot_flops(optimised_hlo: str) -> int:
    """FLOPs of all `dot` instructions in `compiled.as_text()`, 2 a multiply-add.

    Bodies of loops count once, as everywhere in XLA: give it an unrolled program. Compiled for one CPU device, so that
    nothing is partitioned away. Raises ValueError where a dot's operand has no definition in the text.

    >>> import jax, jax.numpy as jnp
    >>> compiled = jax.jit(jnp.dot).lower(jnp.ones((3, 5)), jnp.ones((5, 7))).compile()
    >>> dot_flops(compiled.as_text()) == 2 * 3 * 5 * 7
    True
    """
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0
    for line in optimised_hlo.splitlines():
        if line.endswith("{"):  # parameters of another computation may carry names again
            shapes = {}
        definition = _DEFINITION.match(line)
        if not definition:
            continue
        name, _, dims = definition.groups()
        shapes[name] = _integers(dims)
        dot = _DOT.search(line)
        if dot:
            left, _, contracting = dot.groups()
            if left not in shapes:
                raise ValueError(f"operand {left} of {name} is not defined before it")
            total += 2 * math.prod(shapes[name]) * math.prod(shapes[left][axis] for axis in _integers(contracting))
    return total


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
