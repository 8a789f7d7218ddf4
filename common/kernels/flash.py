"""Flash attention for TPU: a Pallas kernel that expands T5's relative bias tile by tile.

Follows FlashAttention (arXiv 2205.14135): no array of queries x keys exists in memory, forward or backward, and no
array of heads x queries x keys for the bias. The bias is constant along diagonals, so one vector per head, with one
number per distance, holds all of it. `flash_kernels` has the kernels and a picture of their grid.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, M = H/G queries a key-value head, C head
dim, R relative buckets, N = Q + K distances.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from common.kernels import flash_kernels as kernels
from common.kernels.bias import BiasTable, relative_bucket
from common.kernels.blocks import LANES, SUBLANES, even_block, pad_to, round_up
from common.kernels.flash_kernels import Blocks, Cotangents, Gradients, Inputs, Scalars
from common.kernels.visibility import ATTENTION, Visibility

GROUP_BYTES = 2**20
"""Bytes of one block of a group's queries. A kernel holds up to eight times as much, of a TPU's 16 MiB."""
QUERY_SUM_BYTES = 2**21
"""Most bytes that the backward kernel holds of the gradients of bfloat16 queries, in float32, in the same memory; of
float32 queries half as much, since all that it reads and writes is twice as large."""


def flash(
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    block: tuple[int, int] = (512, 512),
    interpret: bool = False,
) -> jax.Array:
    """Returns out_BQHC in the dtype of `q`, as `attention.attend` defines it; logits, softmax and sums are float32.

    Computes tiles of at most `block` (queries, keys): multiples of 128, or smaller powers of two where `interpret` runs
    the kernel without a TPU. Lengths need not be multiples of it. The index of the first query is
    `q_offset`, plus `q_start` where the queries are one device's shard of a longer sequence.

    The bias goes by index, not by position. It is right only if position differences equal index differences, that is
    if key j and query i are `j - i - q_offset` apart, for every pair that sees each other. This holds when a sequence
    attends to itself, packed or not, with positions that count up by one within each segment. Positions are known only
    when the program runs, so the caller vouches for it (`visibility.consecutive`).
    """
    B, Q, H, C = q_BQHC.shape
    _, G, K, _ = k_BGKC.shape
    assert k_BGKC.shape == v_BGKC.shape == (B, G, K, C) and H % G == 0
    assert q_BQHC.dtype == k_BGKC.dtype == v_BGKC.dtype
    assert visibility.q_segments_BQ.shape == (B, Q) and visibility.k_segments_BK.shape == (B, K)
    assert visibility.q_offset >= 0
    assert visibility.bias is None or visibility.bias.table_HR.shape[0] == H
    assert all(n % LANES == 0 or (interpret and SUBLANES <= n < LANES and n.bit_count() == 1) for n in block)
    if 0 in (B, Q, K):
        return jnp.zeros_like(q_BQHC)
    # All query heads of a group stay in fast memory while its keys pass by: many or wide heads need shorter blocks.
    fitting = GROUP_BYTES // (H // G * C * q_BQHC.dtype.itemsize) // LANES * LANES
    block_q, block_k = even_block(Q, min(block[0], max(fitting, LANES))), even_block(K, block[1])
    blocks = Blocks(
        queries=round_up(Q, block_q),
        keys=round_up(K, block_k),
        block_q=block_q,
        block_k=block_k,
        causal=visibility.causal,
        prefix_length=visibility.prefix_length,
        max_distance=None if visibility.bias is None else visibility.bias.max_distance,
        interpret=interpret,
    )
    start = jnp.int32(visibility.q_offset) + (0 if visibility.q_start is None else visibility.q_start)
    q_BGMCQ = jnp.moveaxis((q_BQHC * scale).reshape(B, Q, G, H // G, C), 1, 4)
    bias = visibility.bias
    k_segments_BK = jnp.where(visibility.k_segments_BK == 0, -1, visibility.k_segments_BK)  # see `flash_kernels`
    inputs = Inputs(
        q=pad_to(q_BGMCQ, blocks.queries, axis=-1),
        k=pad_to(k_BGKC.swapaxes(2, 3), blocks.keys, axis=-1),
        v=pad_to(v_BGKC.swapaxes(2, 3), blocks.keys, axis=-1),
        bias=None if bias is None else bias_by_distance(bias, blocks, start).reshape(G, H // G, 1, -1),
        q_segments=pad_to(visibility.q_segments_BQ[:, None], blocks.queries, axis=-1),
        k_segments=pad_to(k_segments_BK[:, None], blocks.keys, axis=-1, value=-1),
    )
    out_BGMCQ = _flash(start[None], inputs, blocks)
    return jnp.moveaxis(out_BGMCQ[..., :Q], 4, 1).reshape(B, Q, H, C)


def bias_by_distance(bias: BiasTable, blocks: Blocks, start: jax.Array) -> jax.Array:
    """Returns bias_HN (float32) at every distance from `keys - start` down to `1 - queries - start`.

    >>> table = BiasTable(table_HR=jnp.arange(8.0)[None], bidirectional=True, max_distance=8)
    >>> other = dict(block_q=2, block_k=2, causal=False, prefix_length=0, max_distance=8, interpret=True)
    >>> bias_by_distance(table, Blocks(queries=4, keys=4, **other), jnp.int32(0)).tolist()
    [[7.0, 6.0, 6.0, 5.0, 0.0, 1.0, 2.0, 2.0]]
    """
    distance_N = blocks.keys - start - jnp.arange(blocks.queries + blocks.keys, dtype=jnp.int32)
    bucket_N = relative_bucket(
        distance_N,
        bidirectional=bias.bidirectional,
        buckets=bias.table_HR.shape[1],
        max_distance=bias.max_distance,
    )
    return bias.table_HR.astype(jnp.float32)[:, bucket_N]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _flash(start_1: jax.Array, inputs: Inputs, blocks: Blocks) -> jax.Array:
    """out_BGMCQ of q_BGMCQ, k_BGCK, v_BGCK, bias_GM1N, q_segments_B1Q and k_segments_B1K, all padded."""
    return _forward(start_1, inputs, blocks)[0]


def _forward(start_1: jax.Array, inputs: Inputs, blocks: Blocks) -> tuple[jax.Array, Any]:
    out, log_sum = (checkpoint_name(x, ATTENTION) for x in _call_forward(blocks, start_1, inputs))
    return out, (start_1, inputs, out, log_sum)


def _backward(blocks: Blocks, residuals: Any, dout_BGMCQ: jax.Array) -> tuple[None, Inputs]:
    start_1, inputs, out, log_sum = residuals
    delta = (dout_BGMCQ.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=3, keepdims=True)
    cotangents = Cotangents(dout=dout_BGMCQ, log_sum=log_sum, delta=delta)
    # The kernel holds the sums of all its queries in fast memory: long or wide ones take several calls.
    _, _, M, C, Q = inputs.q.shape
    most_bytes = QUERY_SUM_BYTES * 2 // inputs.q.dtype.itemsize
    length = max(most_bytes // (M * C * 4) // blocks.block_q, 1) * blocks.block_q
    parts = [slice(begin, min(begin + length, Q)) for begin in range(0, Q, length)]
    dtype = inputs.k.dtype if len(parts) == 1 else jnp.dtype(jnp.float32)
    found = [_call_backward(*_query_part(part, blocks, start_1, inputs, cotangents), dtype) for part in parts]
    dq = jnp.concatenate([part.dq for part in found], axis=-1)
    dk = sum(part.dk for part in found).astype(inputs.k.dtype)
    dv = sum(part.dv for part in found).astype(inputs.v.dtype)
    dbias = None
    if inputs.bias is not None:
        dbias = jnp.zeros(inputs.bias.shape, jnp.float32)
        for part, gradients in zip(parts, found, strict=True):
            dbias = dbias.at[..., _distances(part, blocks)].add(gradients.dbias.sum(axis=0))
    return None, Inputs(q_segments=None, k_segments=None, q=dq, k=dk, v=dv, bias=dbias)


def _query_part(
    part: slice, blocks: Blocks, start_1: jax.Array, inputs: Inputs, cotangents: Cotangents
) -> tuple[Blocks, jax.Array, Inputs, Cotangents]:
    """Everything of the queries in `part` alone."""
    inputs = inputs._replace(
        q=inputs.q[..., part],
        q_segments=inputs.q_segments[..., part],
        bias=None if inputs.bias is None else inputs.bias[..., _distances(part, blocks)],
    )
    cotangents = Cotangents(*(x[..., part] for x in cotangents))
    return dataclasses.replace(blocks, queries=part.stop - part.start), start_1 + part.start, inputs, cotangents


def _distances(part: slice, blocks: Blocks) -> slice:
    """Where the distances from the queries in `part` to all keys are among those of all queries."""
    return slice(part.start, part.stop + blocks.keys)


_flash.defvjp(_forward, _backward)


@partial(
    jax.jit, static_argnums=0
)  # outside of jit, rematerialisation would keep the kernel where its result is unused
def _call_forward(blocks: Blocks, start_1: jax.Array, inputs: Inputs) -> kernels.ForwardOutputs:
    B, G, M, C, Q = inputs.q.shape
    specs = _query_major_specs(blocks, inputs)
    return pl.pallas_call(
        partial(kernels.forward_kernel, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, G, blocks.q_blocks, blocks.k_blocks),
            in_specs=[specs.inputs],
            out_specs=(kernels.ForwardOutputs(out=specs.inputs.q, log_sum=specs.per_query),),
            scratch_shapes=[kernels.ForwardScratch(*(_scratch(M, rows, blocks.block_q) for rows in (1, 1, C)))],
        ),
        out_shape=(
            kernels.ForwardOutputs(
                out=_like(inputs.q),
                log_sum=jax.ShapeDtypeStruct((B, G, M, 1, Q), jnp.float32),
            ),
        ),
        compiler_params=_parallel_axes(3),
        cost_estimate=_cost(blocks, inputs, (start_1, inputs), products=2),
        interpret=blocks.interpret,
        name="flash_forward",
    )(segment_ranges(blocks, start_1, inputs.q_segments, inputs.k_segments), inputs)[0]


def _call_backward(
    blocks: Blocks, start_1: jax.Array, inputs: Inputs, cotangents: Cotangents, dtype: jnp.dtype
) -> Gradients:
    """dq_BGMCQ in the dtype of `q`, dk_BGCK and dv_BGCK in `dtype`, dbias_BGM1N: one for each batch row."""
    B, G, M, C, _ = inputs.q.shape
    specs = _key_major_specs(blocks, inputs)
    dbias = None if inputs.bias is None else jax.ShapeDtypeStruct((B, *inputs.bias.shape), jnp.float32)
    dk = jax.ShapeDtypeStruct(inputs.k.shape, dtype)
    return pl.pallas_call(
        partial(kernels.backward_kernel, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, G, blocks.k_blocks, blocks.q_blocks),
            in_specs=[specs.inputs, specs.cotangents],
            out_specs=(Gradients(dq=specs.dq, dk=specs.inputs.k, dv=specs.inputs.v, dbias=specs.dbias),),
            scratch_shapes=[
                kernels.GradientScratch(
                    dq=_scratch(blocks.q_blocks, M, C, blocks.block_q),
                    dk=_scratch(C, blocks.block_k),
                    dv=_scratch(C, blocks.block_k),
                )
            ],
        ),
        out_shape=(Gradients(dq=_like(inputs.q), dk=dk, dv=dk, dbias=dbias),),
        compiler_params=_parallel_axes(2),
        cost_estimate=_cost(blocks, inputs, (start_1, inputs, cotangents), products=5),
        interpret=blocks.interpret,
        name="flash_backward",
    )(segment_ranges(blocks, start_1, inputs.q_segments, inputs.k_segments), inputs, cotangents)[0]


def segment_ranges(blocks: Blocks, start_1: jax.Array, q_segments: jax.Array, k_segments: jax.Array) -> Scalars:
    """Returns `start` and the lowest and highest segment id in each block, from the padded ids of all rows."""
    q_segments, k_segments = q_segments.reshape(-1, blocks.block_q), k_segments.reshape(-1, blocks.block_k)
    return Scalars(
        start=start_1,
        q_segment_min=q_segments.min(axis=1),
        q_segment_max=q_segments.max(axis=1),
        k_segment_min=k_segments.min(axis=1),
        k_segment_max=k_segments.max(axis=1),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Specs:
    """Which block of each array a step of the grid holds."""

    inputs: Inputs
    per_query: pl.BlockSpec
    """For an array with one number per query, [B, G, M, 1, Q]."""
    dq: pl.BlockSpec
    """For the gradient of the queries, complete with the last block of keys only."""
    dbias: pl.BlockSpec | None
    """For the bias's gradient, [B, G, M, 1, N]: one block has all of a batch row and group."""

    @property
    def cotangents(self) -> Cotangents:
        return Cotangents(dout=self.inputs.q, log_sum=self.per_query, delta=self.per_query)


def _query_major_specs(blocks: Blocks, inputs: Inputs) -> _Specs:
    """For the grid (row, group, query block i, key block j).

    Beyond the last key block that is seen, j stays there, so that no block is fetched in vain.
    """
    return _specs(blocks, inputs, lambda scalars, i, j: (i, jnp.minimum(j, blocks.last_k_block(scalars, i))))


def _key_major_specs(blocks: Blocks, inputs: Inputs) -> _Specs:
    """For the grid (row, group, key block j, query block i).

    Before the first query block that sees anything, i stays there, so that no block is fetched in vain.
    """
    return _specs(blocks, inputs, lambda scalars, j, i: (jnp.maximum(i, blocks.first_q_block(scalars, j)), j))


def _specs(blocks: Blocks, inputs: Inputs, block_of: Any) -> _Specs:
    """`block_of` maps the scalars and the last two grid indices to (query block, key block)."""
    _, _, M, C, _ = inputs.q.shape

    def spec(shape: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda b, g, x, y, scalars: index(b, g, *block_of(scalars, x, y)))

    per_query = spec((None, None, M, 1, blocks.block_q), lambda b, g, i, j: (b, g, 0, 0, i))
    of_keys = spec((None, None, C, blocks.block_k), lambda b, g, i, j: (b, g, 0, j))
    bias = dbias = None
    if inputs.bias is not None:
        bias = spec((None, *inputs.bias.shape[1:]), lambda b, g, i, j: (g, 0, 0, 0))
        dbias = spec((None, None, *inputs.bias.shape[1:]), lambda b, g, i, j: (b, g, 0, 0, 0))
    specs = Inputs(
        q_segments=spec((None, 1, blocks.block_q), lambda b, g, i, j: (b, 0, i)),
        k_segments=spec((None, 1, blocks.block_k), lambda b, g, i, j: (b, 0, j)),
        q=spec((None, None, M, C, blocks.block_q), lambda b, g, i, j: (b, g, 0, 0, i)),
        k=of_keys,
        v=of_keys,
        bias=bias,
    )
    # Until the last block of keys, the first block of queries stays: no unfinished block is written to HBM.
    dq = pl.BlockSpec(
        (None, None, M, C, blocks.block_q),
        lambda b, g, j, i, scalars: (b, g, 0, 0, jnp.where(j == blocks.k_blocks - 1, i, 0)),
    )
    return _Specs(inputs=specs, per_query=per_query, dq=dq, dbias=dbias)


def _scratch(*shape: int) -> Any:
    return pltpu.VMEM(shape, jnp.float32)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _cost(blocks: Blocks, inputs: Inputs, operands: Any, products: int) -> pl.CostEstimate:
    """Cost of a kernel with that many matrix products, for the compiler: it cannot look into a kernel, and schedules
    communication to overlap with it. Counts each operand as read once."""
    B, G, M, C, Q = inputs.q.shape
    pairs = B * G * M * Q * blocks.keys // (2 if blocks.causal else 1)
    read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(operands))
    return pl.CostEstimate(flops=2 * products * pairs * C, transcendentals=pairs, bytes_accessed=read)


def _parallel_axes(count: int) -> pltpu.CompilerParams:
    """Lets the first `count` grid axes go to different cores; the other ones share sums and run in order."""
    parallel, arbitrary = pltpu.GridDimensionSemantics.PARALLEL, pltpu.GridDimensionSemantics.ARBITRARY
    return pltpu.CompilerParams(dimension_semantics=[parallel] * count + [arbitrary] * (4 - count))
