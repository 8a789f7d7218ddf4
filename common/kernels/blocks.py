"""Cuts lengths into the blocks of a TPU kernel."""

import jax
import jax.numpy as jnp

SUBLANES, LANES = 8, 128
"""Rows and columns of a TPU's vector register."""


def even_block(length: int, block: int) -> int:
    """Returns the block length that pads least among those with as few pieces of `length` as `block` gives.

    It is a multiple of 128, or of `block` if that is smaller.

    >>> [even_block(length, 512) for length in (1, 128, 512, 640, 4096)]
    [128, 128, 512, 384, 512]
    """
    step = min(block, LANES)
    pieces = -(-length // block)
    return -(-length // (pieces * step)) * step


def round_up(length: int, block: int) -> int:
    """Returns the smallest multiple of `block` that is at least `length`.

    >>> round_up(640, 384)
    768
    """
    return -(-length // block) * block


def pad_to(x: jax.Array, length: int, axis: int, value: int = 0) -> jax.Array:
    """Appends `value` along one axis up to `length`."""
    widths = [(0, length - size if i == axis % x.ndim else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)
