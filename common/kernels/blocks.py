"""How lengths are cut into the blocks of a TPU kernel."""

import jax
import jax.numpy as jnp

SUBLANES, LANES = 8, 128
"""Rows and columns of a TPU's vector registers."""


def even_block(length: int, block: int) -> int:
    """The smallest block that cuts `length` into no more pieces than `block` does.

    >>> [even_block(length, 512) for length in (1, 128, 512, 640, 4096)]
    [128, 128, 512, 384, 512]
    """
    step = min(block, LANES)
    pieces = -(-length // block)
    return -(-length // (pieces * step)) * step


def multiple(length: int, block: int) -> int:
    """The smallest multiple of `block` that is not less.

    >>> multiple(640, 384)
    768
    """
    return -(-length // block) * block


def padded(x: jax.Array, length: int, axis: int, value: int = 0) -> jax.Array:
    """With `value` behind, along one axis, up to `length`."""
    behind = [(0, length - size if i == axis % x.ndim else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, behind, constant_values=value)
