"""Toeplitz tiles in a TPU's registers: a tile that is constant along its diagonals, made from one number per diagonal.

T5's relative bias depends on the distance between key and query alone, so its tile for a block of keys and a block of
queries is such a tile. With two keys and three queries, and the diagonals numbered from the far key to the near one:

    vector  a b c d e            tile  c d e
                                       b c d

Legend: Q queries (columns) of the tile, K keys (rows) of the tile, W = K + Q diagonals (the first one is not used),
S rows of a strip.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from common.kernels.blocks import LANES, SUBLANES


def toeplitz_tile(vector_1W: jax.Array, keys: int) -> jax.Array:
    """Returns tile_KQ with tile[k, q] = vector[keys + q - k]; sizes are powers of two from 8 or multiples of 128.

    Row k is the vector rolled by k, read from column `keys`. The rows are made by rolls, without a gather: first eight
    copies, rolled by 0 to 7 (one roll for each bit of the row number); then the rows so far again, rolled by another 8,
    16, ... until there are enough or 128. Rows beyond 128 are the same strip read 128 columns further left, which costs
    nothing. (A strided rotate would do the same, but not every TPU has it.)

    >>> tile_KQ = jax.jit(toeplitz_tile, static_argnums=1)(jnp.arange(16.0)[None], 8)
    >>> tile_KQ[0].tolist(), tile_KQ[3].tolist()
    ([8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0], [5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0])
    """
    strip_SW = jnp.broadcast_to(vector_1W, (SUBLANES, vector_1W.shape[1]))
    row_SW = jax.lax.broadcasted_iota(jnp.int32, strip_SW.shape, 0)
    for bit in (1, 2, 4):
        strip_SW = jnp.where(row_SW & bit != 0, pltpu.roll(strip_SW, bit, 1), strip_SW)
    while (rows := strip_SW.shape[0]) < min(keys, LANES):
        strip_SW = jnp.concatenate([strip_SW, pltpu.roll(strip_SW, rows, 1)], axis=0)
    queries = vector_1W.shape[1] - keys
    return jnp.concatenate([strip_SW[:, keys - top :][:, :queries] for top in range(0, keys, rows)], axis=0)


def diagonal_sums(tile_KQ: jax.Array) -> jax.Array:
    """Returns vector_1W of the tile's sums along its diagonals: the transpose of `toeplitz_tile`.

    Undoes the steps of `toeplitz_tile` from the last to the first: adds the strips of 128 rows, folds rows in halves
    down to eight, then rolls these back and adds them up.

    >>> jax.jit(diagonal_sums)(jnp.ones((8, 8)))[0].tolist()
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    """
    keys, queries = tile_KQ.shape
    rows = min(keys, LANES)
    width = keys + queries
    strip_SW = jnp.zeros((rows, width), tile_KQ.dtype)
    for top in range(0, keys, rows):
        before, after = (jnp.zeros((rows, n), tile_KQ.dtype) for n in (keys - top, top))
        strip_SW += jnp.concatenate([before, tile_KQ[top : top + rows], after][: 3 if top else 2], axis=1)
    while rows > SUBLANES:
        rows //= 2
        strip_SW = strip_SW[:rows] + pltpu.roll(strip_SW[rows:], width - rows, 1)
    row_SW = jax.lax.broadcasted_iota(jnp.int32, strip_SW.shape, 0)
    for bit in (4, 2, 1):
        strip_SW = jnp.where(row_SW & bit != 0, pltpu.roll(strip_SW, width - bit, 1), strip_SW)
    return strip_SW.sum(axis=0, keepdims=True)
