"""Cuts lengths into the blocks of a TPU kernel."""

import jax
import jax.numpy as jnp

from common.compute.chips import chip_of
from common.kernels.block_table import BLOCKS

SUBLANES, LANES = 8, 128
"""Rows and columns of a TPU's vector register."""

DEFAULT_BLOCK = 512
"""Queries and keys of a tile where nothing else is known to be faster."""


def best_blocks(device_kind: str, q_BQHC: jax.Array, k_BGKC: jax.Array) -> tuple[int, int]:
    """Returns the most queries and keys for a tile of the flash kernels, from `block_table`.

    It knows calls in two-byte numbers with one query head per key-value head, of a few lengths; the next longer one
    counts, and likewise the next wider head. Others need more of a TPU's fast memory, or were not compiled.

    >>> q, k = jax.ShapeDtypeStruct((1, 512, 8, 64), "bfloat16"), jax.ShapeDtypeStruct((1, 8, 512, 64), "bfloat16")
    >>> best_blocks("TPU v5 lite", q, k), best_blocks("TPU v4", q, k)
    ((512, 512), (512, 512))
    """
    _, Q, H, C = q_BQHC.shape
    _, G, K, _ = k_BGKC.shape
    chip = chip_of(device_kind)
    rows = [(head_dim, length) for name, head_dim, length in BLOCKS if chip and name == chip.name and head_dim >= C]
    if not rows or H != G or q_BQHC.dtype.itemsize != 2:
        return DEFAULT_BLOCK, DEFAULT_BLOCK
    narrowest = min(rows)[0]
    lengths = [length for head_dim, length in rows if head_dim == narrowest]
    fitting = [length for length in lengths if length >= max(Q, K)]
    assert chip is not None
    return BLOCKS[chip.name, narrowest, min(fitting, default=max(lengths))]


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
