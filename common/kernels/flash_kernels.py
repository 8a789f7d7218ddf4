"""The bodies of the flash attention kernels, for one block of queries against one block of keys at a time.

Everything is held with the length in the last axis (the 128 lanes of a TPU's registers), so that a head of 64 wastes
none of them, and a number a query (peak, sum, log-sum) is a row of registers instead of a column. Logits are therefore
transposed: keys down, queries across.

Legend: C head dim, Q queries of a block, K keys of a block, M query heads that share a key-value head, S rows of a
strip, W = Q + K distances a block can hold, N all distances.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from common.kernels.blocks import LANES, SUBLANES
from common.kernels.visibility import MASKED

Ref = Any  # Pallas has no public type for the references that a kernel reads and writes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a call is known before it runs: lengths are multiples of the blocks.

    The index of the first query, `start`, may become known only then: a reference that kernels and the choice of blocks
    read."""

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
        begin = start[0] + i * self.block_q
        last = _quotient(begin + self.block_q - 1, self.block_k)
        if self.prefix_length:
            of_prefix = (self.prefix_length - 1) // self.block_k
            last = jnp.where(begin < self.prefix_length, jnp.maximum(last, of_prefix), last)
        return jnp.minimum(last, self.k_blocks - 1)

    def first_q_block(self, start: Ref, j: Any) -> Any:
        """The first block of queries of which any can see keys of block `j`; no block after it is blind."""
        if not self.causal:
            return 0
        begin = j * self.block_k
        first = jnp.minimum(_quotient(jnp.maximum(begin - start[0], 0), self.block_q), self.q_blocks - 1)
        return jnp.where(begin < self.prefix_length, 0, first) if self.prefix_length else first


def _quotient(x: jax.Array, y: int) -> jax.Array:
    """`x // y` of what is not negative: `//` looks at signs, and lowering that asks for a chip that may not be here."""
    return jax.lax.div(x, jnp.int32(y))


def forward_kernel(plan: Plan, start, qseg, kseg, q, k, v, vector, out, log_sum, peak, total, weighted) -> None:  # type: ignore[no-untyped-def]
    """Grid (row, group, query block, key block): softmax over the key blocks in turn, as in arXiv 2205.14135."""
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def begin() -> None:
        peak[...] = jnp.full(peak.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        weighted[...] = jnp.zeros(weighted.shape, jnp.float32)

    @pl.when(j <= plan.last_k_block(start, i))
    def meet() -> None:
        mask_KQ = _mask(plan, start, qseg, kseg, i, j)

        @pl.loop(0, q.shape[0])
        def head(m: jax.Array) -> None:
            logits_KQ = jnp.where(mask_KQ, _logits(plan, q[m], k[...], vector, m, i, j), MASKED)
            before_1Q = peak[m]
            peak_1Q = jnp.maximum(before_1Q, logits_KQ.max(axis=0, keepdims=True))
            weights_KQ = jnp.where(mask_KQ, jnp.exp(logits_KQ - peak_1Q), 0.0)
            shrink_1Q = jnp.exp(before_1Q - peak_1Q)
            peak[m] = peak_1Q
            total[m] = shrink_1Q * total[m] + weights_KQ.sum(axis=0, keepdims=True)
            weighted[m] = shrink_1Q * weighted[m] + _dot(v[...], weights_KQ.astype(v.dtype), 1, 0)

    @pl.when(j == plan.k_blocks - 1)
    def end() -> None:
        nonzero = jnp.where(total[...] > 0, total[...], 1.0)
        out[...] = (weighted[...] / nonzero).astype(out.dtype)
        log_sum[...] = peak[...] + jnp.log(nonzero)


def dq_kernel(plan: Plan, start, qseg, kseg, q, k, v, vector, dout, log_sum, delta, dq, total) -> None:  # type: ignore[no-untyped-def]
    """Grid (row, group, query block, key block): the gradient of the queries."""
    i, j = pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def begin() -> None:
        total[...] = jnp.zeros(total.shape, jnp.float32)

    @pl.when(j <= plan.last_k_block(start, i))
    def meet() -> None:
        mask_KQ = _mask(plan, start, qseg, kseg, i, j)

        @pl.loop(0, q.shape[0])
        def head(m: jax.Array) -> None:
            logits_KQ = _logits(plan, q[m], k[...], vector, m, i, j)
            _, dlogits_KQ = _dlogits(mask_KQ, logits_KQ, v[...], dout[m], log_sum[m], delta[m])
            total[m] += _dot(k[...], dlogits_KQ.astype(k.dtype), 1, 0)

    @pl.when(j == plan.k_blocks - 1)
    def end() -> None:
        dq[...] = total[...].astype(dq.dtype)


def dkv_kernel(
    plan: Plan, start, qseg, kseg, q, k, v, vector, dout, log_sum, delta, dk, dv, dvector, dk_sum, dv_sum
) -> None:  # type: ignore[no-untyped-def]
    """Grid (row, group, key block, query block): the gradients of keys, values and the vector of the bias.

    `dvector` keeps its place in memory over both loops of blocks: it is a row's and group's own sum.
    """
    j, i = pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def begin() -> None:
        dk_sum[...] = jnp.zeros(dk_sum.shape, jnp.float32)
        dv_sum[...] = jnp.zeros(dv_sum.shape, jnp.float32)

    if dvector is not None:

        @pl.when((i == 0) & (j == 0))
        def blank() -> None:
            dvector[...] = jnp.zeros(dvector.shape, jnp.float32)

    @pl.when(j <= plan.last_k_block(start, i))
    def meet() -> None:
        mask_KQ = _mask(plan, start, qseg, kseg, i, j)

        @pl.loop(0, q.shape[0])
        def head(m: jax.Array) -> None:
            logits_KQ = _logits(plan, q[m], k[...], vector, m, i, j)
            weights_KQ, dlogits_KQ = _dlogits(mask_KQ, logits_KQ, v[...], dout[m], log_sum[m], delta[m])
            dv_sum[...] += _dot(dout[m], weights_KQ.astype(dout.dtype), 1, 1)
            dk_sum[...] += _dot(q[m], dlogits_KQ.astype(q.dtype), 1, 1)
            if dvector is not None:
                dvector[m, :, _distances(plan, i, j)] += collapse(dlogits_KQ)

    @pl.when(i == plan.q_blocks - 1)
    def end() -> None:
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


def _mask(plan: Plan, start: Ref, qseg: Ref, kseg: Ref, i: jax.Array, j: jax.Array) -> jax.Array:
    """mask_KQ of query block `i` and key block `j`."""
    # A column of memory would take 128 times its size, so a row is turned here (eight equal ones, as registers are).
    kseg_K1 = jnp.broadcast_to(kseg[...], (SUBLANES, plan.block_k)).T[:, :1]
    mask_KQ = (kseg_K1 == qseg[...]) & (kseg_K1 != 0)
    if not plan.causal:
        return mask_KQ
    k_index_KQ = j * plan.block_k + jax.lax.broadcasted_iota(jnp.int32, mask_KQ.shape, 0)
    q_index_KQ = start[0] + i * plan.block_q + jax.lax.broadcasted_iota(jnp.int32, mask_KQ.shape, 1)
    seen_KQ = k_index_KQ <= q_index_KQ
    if plan.prefix_length:
        seen_KQ |= jnp.maximum(k_index_KQ, q_index_KQ) < plan.prefix_length
    return mask_KQ & seen_KQ


def _logits(
    plan: Plan, q_CQ: jax.Array, k_CK: jax.Array, vector: Ref | None, m: jax.Array, i: jax.Array, j: jax.Array
) -> jax.Array:
    logits_KQ = _dot(k_CK, q_CQ, 0, 0)
    return logits_KQ if vector is None else logits_KQ + expand(vector[m, :, _distances(plan, i, j)], plan.block_k)


def _dlogits(
    mask_KQ: jax.Array,
    logits_KQ: jax.Array,
    v_CK: jax.Array,
    dout_CQ: jax.Array,
    log_sum_1Q: jax.Array,
    delta_1Q: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The weights once more, and the gradient of the logits."""
    weights_KQ = jnp.where(mask_KQ, jnp.exp(logits_KQ - log_sum_1Q), 0.0)
    return weights_KQ, weights_KQ * (_dot(v_CK, dout_CQ, 0, 0) - delta_1Q)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """Summed over one axis of each, in float32."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _distances(plan: Plan, i: jax.Array, j: jax.Array) -> Any:
    """Where the W distances between blocks `i` and `j` stand in the vector of all, which runs from far keys to near."""
    begin = i * plan.block_q - j * plan.block_k + plan.keys - plan.block_k
    step = min(plan.block_q, plan.block_k, LANES)
    return pl.ds(pl.multiple_of(begin, step), plan.block_q + plan.block_k)


def expand(vector_1W: jax.Array, keys: int) -> jax.Array:
    """tile_KQ with tile[c, r] = vector[keys + r - c]: a Toeplitz tile from its diagonals.

    Row c of a strip is the vector rolled by c; a strip of 128 rows is enough, as the rows after them are the same strip
    seen from 128 places further on, which costs nothing. Rows are doubled until there are enough, with plain rolls:
    the strided rotate would do as many, and not every TPU has it.
    """
    strip_SW = jnp.broadcast_to(vector_1W, (SUBLANES, vector_1W.shape[1]))
    row_SW = jax.lax.broadcasted_iota(jnp.int32, strip_SW.shape, 0)
    for bit in (1, 2, 4):
        strip_SW = jnp.where(row_SW & bit != 0, pltpu.roll(strip_SW, bit, 1), strip_SW)
    while (rows := strip_SW.shape[0]) < min(keys, LANES):
        strip_SW = jnp.concatenate([strip_SW, pltpu.roll(strip_SW, rows, 1)], axis=0)
    queries = vector_1W.shape[1] - keys
    return jnp.concatenate([strip_SW[:, keys - top :][:, :queries] for top in range(0, keys, rows)], axis=0)


def collapse(tile_KQ: jax.Array) -> jax.Array:
    """vector_1W of the tile's diagonal sums: the transpose of `expand`, step by step from its end."""
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
