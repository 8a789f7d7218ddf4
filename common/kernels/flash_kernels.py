"""The bodies of the flash attention kernels: one block of queries against one block of keys at a time.

The grid has four numbers: batch row, key-value group, and the two that say which tile of the logits is computed. For
one row and group, a causal call of four blocks of queries and three of keys has these tiles:

                        queries ->
                  i=0     i=1     i=2     i=3
              +-------+-------+-------+-------+
    keys  j=0 |  cut  | whole | whole | whole |      whole  every query sees every key
      |       +-------+-------+-------+-------+      cut    the causal mask passes through the tile
      v   j=1 | skip  |  cut  | whole | whole |      skip   no query sees any key: nothing is fetched or computed
              +-------+-------+-------+-------+
          j=2 | skip  | skip  |  cut  | whole |
              +-------+-------+-------+-------+

    forward, dq   grid (row, group, i, j): down each column, j = 0 ... last_k_block(i); sums over keys in scratch
    dkv           grid (row, group, j, i): along each row, i = first_q_block(j) ...; sums over queries in scratch

A step of the grid holds all M query heads of its group, and loops over them. Its references, of which the row and the
group are already chosen:

    start       [1]        index of the first query among the keys, in scalar memory
    q_segments  [1, Q]     segment ids of the queries; of the keys: [1, K]
    q           [M, C, Q]  scaled queries; likewise dout, out and dq
    k, v        [C, K]     keys and values; likewise dk and dv
    bias        [M, 1, N]  bias by distance, of all distances of the call, or None; likewise dbias
    log_sum     [M, 1, Q]  logarithm of each query's sum of weights; likewise delta

The length is always the last axis (the 128 lanes of a TPU's registers): a head of 64 wastes no lanes, and one number
per query (peak, sum, log-sum) is a row of registers, not a column. The logits are therefore transposed: keys down,
queries across.

Legend: C head dim, Q queries of a block, K keys of a block, M query heads that share a key-value head, W = Q + K
distances within a tile, N all distances.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from common.kernels.blocks import LANES, SUBLANES
from common.kernels.toeplitz import diagonal_sums, toeplitz_tile
from common.kernels.visibility import MASKED

Ref = Any  # Pallas has no public type for the references that a kernel reads and writes


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
    """What the kernels for gradients also read."""

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


class KeyOutputs(NamedTuple):
    """What the kernel for keys, values and bias writes."""

    dk: Any
    dv: Any
    dbias: Any
    """The gradient from one batch row; None without a bias."""


class KeyScratch(NamedTuple):
    """Running sums over the queries so far, in float32."""

    dk: Any
    dv: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Sizes of one call and how they are cut into blocks: all that is known when the program is traced.

    Lengths are padded to multiples of the blocks. Only `start`, the index of the first query among the keys, may be
    known later than that; it is a reference.
    """

    queries: int
    keys: int
    block_q: int
    block_k: int
    causal: bool
    prefix_length: int
    interpret: bool

    @property
    def q_blocks(self) -> int:
        return self.queries // self.block_q

    @property
    def k_blocks(self) -> int:
        return self.keys // self.block_k

    def last_k_block(self, start: Ref, i: Any) -> Any:
        """The last block of keys that any query of block `i` can see."""
        if not self.causal:
            return self.k_blocks - 1
        first_query = start[0] + i * self.block_q
        last = _quotient(first_query + self.block_q - 1, self.block_k)
        if self.prefix_length:
            last_of_prefix = (self.prefix_length - 1) // self.block_k
            last = jnp.where(first_query < self.prefix_length, jnp.maximum(last, last_of_prefix), last)
        return jnp.minimum(last, self.k_blocks - 1)

    def first_q_block(self, start: Ref, j: Any) -> Any:
        """The first block of queries in which any can see keys of block `j`; in all later blocks some can too."""
        if not self.causal:
            return 0
        first_key = j * self.block_k
        first = jnp.minimum(_quotient(jnp.maximum(first_key - start[0], 0), self.block_q), self.q_blocks - 1)
        return jnp.where(first_key < self.prefix_length, 0, first) if self.prefix_length else first

    def distances(self, i: jax.Array, j: jax.Array) -> Any:
        """Returns where the W distances within tile (i, j) are among all N, which run from far keys to near ones.

        With four queries and four keys in blocks of two, the distances (key - query) are 4, 3, ..., -3. Tile (0, 1), of
        queries 0 and 1 and keys 2 and 3, has the first four of them, of which the 4 is not used.
        """
        begin = i * self.block_q - j * self.block_k + self.keys - self.block_k
        step = min(self.block_q, self.block_k, LANES)
        return pl.ds(pl.multiple_of(begin, step), self.block_q + self.block_k)


def _quotient(x: jax.Array, y: int) -> jax.Array:
    """Returns `x // y` for x >= 0. (`//` tests signs, and lowering that asks for a chip that may not be here.)"""
    return jax.lax.div(x, jnp.int32(y))


def forward_kernel(blocks: Blocks, start: Ref, inputs: Inputs, outputs: ForwardOutputs, sums: ForwardScratch) -> None:
    """Grid (row, group, query block, key block): an online softmax over the key blocks, as in arXiv 2205.14135."""
    i, j = pl.program_id(2), pl.program_id(3)
    peak, total, weighted = sums

    @pl.when(j == 0)
    def initialise() -> None:
        peak[...] = jnp.full(peak.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        weighted[...] = jnp.zeros(weighted.shape, jnp.float32)

    @pl.when(j <= blocks.last_k_block(start, i))
    def accumulate() -> None:
        mask_KQ = _mask(blocks, start, inputs, i, j)

        @pl.loop(0, inputs.q.shape[0])
        def head(m: jax.Array) -> None:
            logits_KQ = jnp.where(mask_KQ, _logits(blocks, inputs, m, i, j), MASKED)
            before_1Q = peak[m]
            peak_1Q = jnp.maximum(before_1Q, logits_KQ.max(axis=0, keepdims=True))
            weights_KQ = jnp.where(mask_KQ, jnp.exp(logits_KQ - peak_1Q), 0.0)
            shrink_1Q = jnp.exp(before_1Q - peak_1Q)
            peak[m] = peak_1Q
            total[m] = shrink_1Q * total[m] + weights_KQ.sum(axis=0, keepdims=True)
            weighted[m] = shrink_1Q * weighted[m] + _dot(inputs.v[...], weights_KQ.astype(inputs.v.dtype), 1, 0)

    @pl.when(j == blocks.k_blocks - 1)
    def write() -> None:
        nonzero = jnp.where(total[...] > 0, total[...], 1.0)
        outputs.out[...] = (weighted[...] / nonzero).astype(outputs.out.dtype)
        outputs.log_sum[...] = peak[...] + jnp.log(nonzero)


def dq_kernel(blocks: Blocks, start: Ref, inputs: Inputs, cotangents: Cotangents, dq: Ref, dq_sum: Ref) -> None:
    """Grid (row, group, query block, key block): the gradient of the queries, summed over the key blocks."""
    i, j = pl.program_id(2), pl.program_id(3)
    k = inputs.k

    @pl.when(j == 0)
    def initialise() -> None:
        dq_sum[...] = jnp.zeros(dq_sum.shape, jnp.float32)

    @pl.when(j <= blocks.last_k_block(start, i))
    def accumulate() -> None:
        mask_KQ = _mask(blocks, start, inputs, i, j)

        @pl.loop(0, inputs.q.shape[0])
        def head(m: jax.Array) -> None:
            logits_KQ = _logits(blocks, inputs, m, i, j)
            _, dlogits_KQ = _weights_and_dlogits(mask_KQ, logits_KQ, inputs.v, cotangents, m)
            dq_sum[m] += _dot(k[...], dlogits_KQ.astype(k.dtype), 1, 0)

    @pl.when(j == blocks.k_blocks - 1)
    def write() -> None:
        dq[...] = dq_sum[...].astype(dq.dtype)


def dkv_kernel(
    blocks: Blocks, start: Ref, inputs: Inputs, cotangents: Cotangents, outputs: KeyOutputs, sums: KeyScratch
) -> None:
    """Grid (row, group, key block, query block): gradients of keys, values and bias, summed over the query blocks.

    `outputs.dbias` stays in fast memory over both loops of blocks, and is itself the sum for its row and group.
    """
    j, i = pl.program_id(2), pl.program_id(3)
    q, dout, dbias = inputs.q, cotangents.dout, outputs.dbias

    @pl.when(i == 0)
    def initialise() -> None:
        sums.dk[...] = jnp.zeros(sums.dk.shape, jnp.float32)
        sums.dv[...] = jnp.zeros(sums.dv.shape, jnp.float32)

    if dbias is not None:

        @pl.when((i == 0) & (j == 0))
        def initialise_bias() -> None:
            dbias[...] = jnp.zeros(dbias.shape, jnp.float32)

    @pl.when(j <= blocks.last_k_block(start, i))
    def accumulate() -> None:
        mask_KQ = _mask(blocks, start, inputs, i, j)

        @pl.loop(0, q.shape[0])
        def head(m: jax.Array) -> None:
            logits_KQ = _logits(blocks, inputs, m, i, j)
            weights_KQ, dlogits_KQ = _weights_and_dlogits(mask_KQ, logits_KQ, inputs.v, cotangents, m)
            sums.dv[...] += _dot(dout[m], weights_KQ.astype(dout.dtype), 1, 1)
            sums.dk[...] += _dot(q[m], dlogits_KQ.astype(q.dtype), 1, 1)
            if dbias is not None:
                dbias[m, :, blocks.distances(i, j)] += diagonal_sums(dlogits_KQ)

    @pl.when(i == blocks.q_blocks - 1)
    def write() -> None:
        outputs.dk[...] = sums.dk[...].astype(outputs.dk.dtype)
        outputs.dv[...] = sums.dv[...].astype(outputs.dv.dtype)


def _mask(blocks: Blocks, start: Ref, inputs: Inputs, i: jax.Array, j: jax.Array) -> jax.Array:
    """mask_KQ for query block `i` and key block `j`: True where the query sees the key."""
    # Key segments come as a row, since a column in memory would take 128 times its size. Transposing needs eight equal
    # rows, as many as a register has.
    k_segments_K1 = jnp.broadcast_to(inputs.k_segments[...], (SUBLANES, blocks.block_k)).T[:, :1]
    mask_KQ = (k_segments_K1 == inputs.q_segments[...]) & (k_segments_K1 != 0)
    if not blocks.causal:
        return mask_KQ
    k_index_KQ = j * blocks.block_k + jax.lax.broadcasted_iota(jnp.int32, mask_KQ.shape, 0)
    q_index_KQ = start[0] + i * blocks.block_q + jax.lax.broadcasted_iota(jnp.int32, mask_KQ.shape, 1)
    causal_KQ = k_index_KQ <= q_index_KQ
    if blocks.prefix_length:
        causal_KQ |= jnp.maximum(k_index_KQ, q_index_KQ) < blocks.prefix_length
    return mask_KQ & causal_KQ


def _logits(blocks: Blocks, inputs: Inputs, m: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """logits_KQ of query head `m`, with the bias and before the mask."""
    q_CQ, k_CK = inputs.q[m], inputs.k[...]
    logits_KQ = _dot(k_CK, q_CQ, 0, 0)
    if inputs.bias is None:
        return logits_KQ
    return logits_KQ + toeplitz_tile(inputs.bias[m, :, blocks.distances(i, j)], blocks.block_k)


def _weights_and_dlogits(
    mask_KQ: jax.Array, logits_KQ: jax.Array, v: Ref, cotangents: Cotangents, m: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """weights_KQ of head `m`, recomputed from the log-sums, and the gradient of the logits."""
    v_CK, dout_CQ, log_sum_1Q, delta_1Q = v[...], *(x[m] for x in cotangents)
    weights_KQ = jnp.where(mask_KQ, jnp.exp(logits_KQ - log_sum_1Q), 0.0)
    return weights_KQ, weights_KQ * (_dot(v_CK, dout_CQ, 0, 0) - delta_1Q)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The product of two matrices summed over the given axis of each, in float32."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)
