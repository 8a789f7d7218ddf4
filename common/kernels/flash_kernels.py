"""The bodies of the flash attention kernels: one block of queries against one block of keys at a time.

The grid has four numbers: batch row, key-value group, and the two that say which tile of the logits is computed. For
one row and group, a causal call of four blocks of queries and three of keys has these tiles:

                        queries ->
                  i=0     i=1     i=2     i=3
              +-------+-------+-------+-------+
    keys  j=0 | mixed | mixed | even  | even  |      even   every query sees every key, and all logits get one bias
      |       +-------+-------+-------+-------+      mixed  a mask or more than one bias: the causal border, the end of
      v   j=1 | skip  | mixed | mixed | even  |             a segment, or distances that have buckets of their own
              +-------+-------+-------+-------+      skip   no query sees any key: nothing is computed
          j=2 | skip  | skip  | mixed | mixed |
              +-------+-------+-------+-------+

    forward    grid (row, group, i, j): down each column, j = 0 ... last_k_block(i); sums over keys in scratch
    backward   grid (row, group, j, i): along each row, i = first_q_block(j) ...; sums over queries in scratch, and the
               sums over keys of all queries too

An even tile needs no mask, and its bias is one number, which is subtracted from each query's peak instead of added to
each logit. It takes about two thirds of a mixed one's time. T5's bias is one number per head and direction from
`max_distance` on, so that most tiles of a long sequence are even.

A step of the grid holds all M query heads of its group, and loops over them. Its references, of which the row and the
group are already chosen:

    q_segments  [1, Q]     segment ids of the queries, 0 for padding
    k_segments  [1, K]     segment ids of the keys, -1 for padding: neither sees the other
    q           [M, C, Q]  scaled queries; likewise dout, out and dq
    k, v        [C, K]     keys and values; likewise dk and dv
    bias        [M, 1, N]  bias by distance, of all distances of the call, or None; likewise dbias
    log_sum     [M, 1, Q]  logarithm of each query's sum of weights; likewise delta

The length is always the last axis (the 128 lanes of a TPU's registers): a head of 64 wastes no lanes, and one number
per query (peak, sum, log-sum) is a row of registers, not a column. The logits are therefore transposed: keys down,
queries across.

Legend: B batch rows, I blocks of queries, J blocks of keys, C head dim, Q queries of a block, K keys of a block, M
query heads that share a key-value head, W = Q + K distances within a tile, N all distances.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from common.kernels.blocks import LANES, SUBLANES
from common.kernels.toeplitz import diagonal_sums, toeplitz_tile
from common.kernels.visibility import MASKED

Ref = Any  # Pallas has no public type for the references that a kernel reads and writes


class Scalars(NamedTuple):
    """What decides the kind of each tile: arrays in the call, references to scalar memory elsewhere."""

    start: Any
    """[1]: index of the first query among the keys."""
    q_segment_min: Any
    """[B * I]: the lowest segment id in each block of queries; likewise below."""
    q_segment_max: Any
    k_segment_min: Any
    k_segment_max: Any


class Inputs(NamedTuple):
    """What every kernel reads: arrays in the call, block specs in the grid, references in the kernel."""

    q_segments: Any
    k_segments: Any
    q: Any
    k: Any
    v: Any
    bias: Any
    """None without a bias."""


class Cotangents(NamedTuple):
    """What the kernel for gradients also reads."""

    dout: Any
    log_sum: Any
    delta: Any
    """Each query's sum of `dout * out` over the head dim."""


class ForwardOutputs(NamedTuple):
    """What the forward kernel writes."""

    out: Any
    log_sum: Any


class ForwardScratch(NamedTuple):
    """Running results over the keys so far: each query's largest logit, sum of weights and sum of weighted values."""

    peak: Any
    total: Any
    weighted: Any


class Gradients(NamedTuple):
    """What the backward kernel writes."""

    dq: Any
    dk: Any
    dv: Any
    dbias: Any
    """The gradient from one batch row; None without a bias."""


class GradientScratch(NamedTuple):
    """Running sums in float32: over the keys so far for all queries, [I, M, C, Q], and over the queries so far."""

    dq: Any
    dk: Any
    dv: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of one call and how they are cut into blocks: all that is known when the program is traced.

    Lengths are padded to multiples of the blocks. Only `Scalars` are known later than that.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    causal: bool
    prefix_length: int
    max_distance: int | None
    """Keys that are at least so far from a query get the same bias, one before and one after it. None: no bias."""
    interpret: bool

    @property
    def q_blocks(self) -> int:
        return self.queries // self.block_q

    @property
    def k_blocks(self) -> int:
        return self.keys // self.block_k

    def last_k_block(self, scalars: Scalars, i: Any) -> Any:
        """The last block of keys that any query of block `i` can see."""
        if not self.causal:
            return self.k_blocks - 1
        first_query = scalars.start[0] + i * self.block_q
        last = _quotient(first_query + self.block_q - 1, self.block_k)
        if self.prefix_length:
            last_of_prefix = (self.prefix_length - 1) // self.block_k
            last = jnp.where(first_query < self.prefix_length, jnp.maximum(last, last_of_prefix), last)
        return jnp.minimum(last, self.k_blocks - 1)

    def first_q_block(self, scalars: Scalars, j: Any) -> Any:
        """The first block of queries in which any can see keys of block `j`; in all later blocks some can too."""
        if not self.causal:
            return 0
        first_key = j * self.block_k
        first = _quotient(jnp.maximum(first_key - scalars.start[0], 0), self.block_q)
        first = jnp.minimum(first, self.q_blocks - 1)
        return jnp.where(first_key < self.prefix_length, 0, first) if self.prefix_length else first

    def kind(self, scalars: Scalars, row: Any, i: Any, j: Any) -> tuple[jax.Array, jax.Array]:
        """Returns whether any query of block `i` may see a key of block `j` in this batch row, and whether the tile is
        even. Goes by the range of segment ids in each block, so a mixed tile may turn out to have nothing to see."""
        of_q, of_k = row * self.q_blocks + i, row * self.k_blocks + j
        q_min, q_max = scalars.q_segment_min[of_q], scalars.q_segment_max[of_q]
        k_min, k_max = scalars.k_segment_min[of_k], scalars.k_segment_max[of_k]
        seen = (j <= self.last_k_block(scalars, i)) & (q_min <= k_max) & (k_min <= q_max)
        even = (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
        first_query, first_key = scalars.start[0] + i * self.block_q, j * self.block_k
        last_query, last_key = first_query + self.block_q - 1, first_key + self.block_k - 1
        if self.causal:
            even &= (last_key <= first_query) | (jnp.maximum(last_key, last_query) < self.prefix_length)
        if self.max_distance is not None:
            before = last_key - first_query <= -self.max_distance
            after = first_key - last_query >= self.max_distance
            even &= before | after
        return seen, even

    def distances(self, i: jax.Array, j: jax.Array) -> Any:
        """Returns where the W distances within tile (i, j) are among all N, which run from far keys to near ones.

        With four queries and four keys in blocks of two, the distances (key - query) are 4, 3, ..., -3. Tile (0, 1), of
        queries 0 and 1 and keys 2 and 3, has the first four of them, of which the 4 is not used.
        """
        return pl.ds(self._first_distance(i, j), self.block_q + self.block_k)

    def first_key_distances(self, i: jax.Array, j: jax.Array) -> Any:
        """Returns where the distances of the first key in tile (i, j) are among all N, one for each query."""
        return pl.ds(pl.multiple_of(self._first_distance(i, j) + self.block_k, self._step), self.block_q)

    def _first_distance(self, i: jax.Array, j: jax.Array) -> jax.Array:
        return pl.multiple_of(i * self.block_q - j * self.block_k + self.keys - self.block_k, self._step)

    @property
    def _step(self) -> int:
        return min(self.block_q, self.block_k, LANES)


def _quotient(x: jax.Array, y: int) -> jax.Array:
    """Returns `x // y` for x >= 0. (`//` tests signs, and lowering that asks for a chip that may not be here.)"""
    return jax.lax.div(x, jnp.int32(y))


def forward_kernel(
    blocks: Blocks, scalars: Scalars, inputs: Inputs, outputs: ForwardOutputs, sums: ForwardScratch
) -> None:
    """Grid (row, group, query block, key block): an online softmax over the key blocks, as in arXiv 2205.14135."""
    i, j = pl.program_id(2), pl.program_id(3)
    peak, total, weighted = sums

    @pl.when(j == 0)
    def initialise() -> None:
        peak[...] = jnp.full(peak.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        weighted[...] = jnp.zeros(weighted.shape, jnp.float32)

    def add(m: jax.Array, logits_KQ: jax.Array, bias_1Q: jax.Array | float) -> None:
        before_1Q = peak[m]
        peak_1Q = jnp.maximum(before_1Q, logits_KQ.max(axis=0, keepdims=True) + bias_1Q)
        # Where nothing is seen so far, the peak is MASKED; subtracting 0 keeps the weights of masked logits 0.
        weights_KQ = jnp.exp(logits_KQ - (jnp.where(peak_1Q == MASKED, 0.0, peak_1Q) - bias_1Q))
        shrink_1Q = jnp.exp(before_1Q - peak_1Q)
        peak[m] = peak_1Q
        total[m] = shrink_1Q * total[m] + weights_KQ.sum(axis=0, keepdims=True)
        weighted[m] = shrink_1Q * weighted[m] + _dot(inputs.v[...], weights_KQ.astype(inputs.v.dtype), 1, 0)

    _each_head(blocks, scalars, inputs, i, j, lambda m, logits_KQ, bias_1Q, even: add(m, logits_KQ, bias_1Q))

    @pl.when(j == blocks.k_blocks - 1)
    def write() -> None:
        some = total[...] > 0
        nonzero = jnp.where(some, total[...], 1.0)
        outputs.out[...] = (weighted[...] / nonzero).astype(outputs.out.dtype)
        # 0 for a query that sees nothing: weights of masked logits, recomputed from it, are 0.
        outputs.log_sum[...] = jnp.where(some, peak[...] + jnp.log(nonzero), 0.0)


def backward_kernel(
    blocks: Blocks,
    scalars: Scalars,
    inputs: Inputs,
    cotangents: Cotangents,
    outputs: Gradients,
    sums: GradientScratch,
) -> None:
    """Grid (row, group, key block, query block): all gradients in one pass, which recomputes the weights once.

    `sums.dq` and `outputs.dbias` stay in fast memory over both loops of blocks; `outputs.dbias` is itself the sum for
    its row and group.
    """
    j, i = pl.program_id(2), pl.program_id(3)
    q, k, v, dout, dbias = inputs.q, inputs.k, inputs.v, cotangents.dout, outputs.dbias

    @pl.when(i == 0)
    def initialise_key_sums() -> None:
        sums.dk[...] = jnp.zeros(sums.dk.shape, jnp.float32)
        sums.dv[...] = jnp.zeros(sums.dv.shape, jnp.float32)

    @pl.when(j == 0)
    def initialise_query_sums() -> None:
        sums.dq[i] = jnp.zeros(sums.dq.shape[1:], jnp.float32)

    if dbias is not None:

        @pl.when((i == 0) & (j == 0))
        def initialise_bias() -> None:
            dbias[...] = jnp.zeros(dbias.shape, jnp.float32)

    def add(m: jax.Array, logits_KQ: jax.Array, bias_1Q: jax.Array | float, even: bool) -> None:
        weights_KQ = jnp.exp(logits_KQ - (cotangents.log_sum[m] - bias_1Q))
        dlogits_KQ = weights_KQ * (_dot(v[...], dout[m], 0, 0) - cotangents.delta[m])
        rounded_KQ = dlogits_KQ.astype(q.dtype)
        sums.dv[...] += _dot(dout[m], weights_KQ.astype(dout.dtype), 1, 1)
        sums.dk[...] += _dot(q[m], rounded_KQ, 1, 1)
        sums.dq[i, m] += _dot(k[...], rounded_KQ, 1, 0)
        if dbias is not None:
            if even:  # all distances share one bias: the gradient goes to those of the first key
                dbias[m, :, blocks.first_key_distances(i, j)] += dlogits_KQ.sum(axis=0, keepdims=True)
            else:
                dbias[m, :, blocks.distances(i, j)] += diagonal_sums(dlogits_KQ)

    _each_head(blocks, scalars, inputs, i, j, add)

    @pl.when(i == blocks.q_blocks - 1)
    def write_keys() -> None:
        outputs.dk[...] = sums.dk[...].astype(outputs.dk.dtype)
        outputs.dv[...] = sums.dv[...].astype(outputs.dv.dtype)

    @pl.when(j == blocks.k_blocks - 1)
    def write_queries() -> None:
        outputs.dq[...] = sums.dq[i].astype(outputs.dq.dtype)


def _each_head(
    blocks: Blocks, scalars: Scalars, inputs: Inputs, i: jax.Array, j: jax.Array, add: Callable[..., None]
) -> None:
    """Calls `add(m, logits_KQ, bias_1Q, even)` for each query head `m` of tile (i, j), unless the tile is skipped.

    In an even tile, `bias_1Q` is still to be added to each logit; it is the same number for every query. In a mixed
    one it is 0, and the logits have their bias and mask.
    """
    seen, even = blocks.kind(scalars, pl.program_id(0), i, j)

    @pl.when(seen & even)
    def even_tile() -> None:
        @pl.loop(0, inputs.q.shape[0])
        def head(m: jax.Array) -> None:
            bias_1Q = 0.0 if inputs.bias is None else inputs.bias[m, :, blocks.first_key_distances(i, j)]
            add(m, _dot(inputs.k[...], inputs.q[m], 0, 0), bias_1Q, True)

    @pl.when(seen & ~even)
    def mixed_tile() -> None:
        mask_KQ = _mask(blocks, scalars, inputs, i, j)

        @pl.loop(0, inputs.q.shape[0])
        def head(m: jax.Array) -> None:
            logits_KQ = _dot(inputs.k[...], inputs.q[m], 0, 0)
            if inputs.bias is not None:
                logits_KQ += toeplitz_tile(inputs.bias[m, :, blocks.distances(i, j)], blocks.block_k)
            add(m, jnp.where(mask_KQ, logits_KQ, MASKED), 0.0, False)


def _mask(blocks: Blocks, scalars: Scalars, inputs: Inputs, i: jax.Array, j: jax.Array) -> jax.Array:
    """mask_KQ for query block `i` and key block `j`: True where the query sees the key."""
    # Key segments come as a row, since a column in memory would take 128 times its size. Transposing needs eight equal
    # rows, as many as a register has.
    k_segments_K1 = jnp.broadcast_to(inputs.k_segments[...], (SUBLANES, blocks.block_k)).T[:, :1]
    mask_KQ = k_segments_K1 == inputs.q_segments[...]
    if not blocks.causal:
        return mask_KQ
    k_index_KQ = j * blocks.block_k + jax.lax.broadcasted_iota(jnp.int32, mask_KQ.shape, 0)
    q_index_KQ = scalars.start[0] + i * blocks.block_q + jax.lax.broadcasted_iota(jnp.int32, mask_KQ.shape, 1)
    causal_KQ = k_index_KQ <= q_index_KQ
    if blocks.prefix_length:
        causal_KQ |= jnp.maximum(k_index_KQ, q_index_KQ) < blocks.prefix_length
    return mask_KQ & causal_KQ


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The product of two matrices summed over the given axis of each, in float32."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)
