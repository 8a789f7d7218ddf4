"""A transformer's sizes from its width: what is usual, unless stated otherwise."""

from typing import TypedDict

from common.errors import UserError
from common.ranges import Width

NARROW = 512
"""Models narrower than this have heads of 32, others of 64."""


class BlockSizes(TypedDict):
    """The fields of a model config that a layer's shapes follow from."""

    d_model: Width
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    d_ff: Width


def block_sizes(
    width: int,
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    d_ff: int | None = None,
) -> BlockSizes:
    """Completes the sizes of a layer. By default heads fill the width, keys have as many, and d_ff is 4 x width.

    Raises UserError if heads of `head_dim` cannot fill the width and `heads` is not given.

    >>> block_sizes(128)
    {'d_model': 128, 'num_heads': 4, 'num_kv_heads': 4, 'head_dim': 32, 'd_ff': 512}
    >>> block_sizes(4096, heads=32, kv_heads=8, d_ff=14336)
    {'d_model': 4096, 'num_heads': 32, 'num_kv_heads': 8, 'head_dim': 128, 'd_ff': 14336}
    """
    if head_dim is None:
        head_dim = (32 if width < NARROW else 64) if heads is None else width // heads
    if heads is None:
        heads = width // head_dim
        if heads * head_dim != width:
            raise UserError(f"width is {width}, which heads of {head_dim} do not fill: give heads, or another head_dim")
    return {
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "d_ff": 4 * width if d_ff is None else d_ff,
    }
