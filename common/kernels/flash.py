"""Flash attention for TPU as a Pallas kernel that expands T5's relative bias block by block.

The scheme of FlashAttention (arXiv 2205.14135): no array of queries x keys exists in memory, forward or backward, and
none of heads x queries x keys for the bias either. The bias is constant along diagonals, so a vector a head, one number
a distance, holds all of it.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, M = H/G queries a key-value head, C head
dim, R relative buckets, N distances.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from common.kernels import flash_kernels as kernels
from common.kernels.bias import BiasTable, relative_bucket
from common.kernels.blocks import LANES, SUBLANES, even_block, multiple, padded
from common.kernels.flash_kernels import Plan
from common.kernels.visibility import ATTENTION, Visibility

GROUP_BYTES = 2**20  # of queries, a block; a kernel has up to eight times that, of 16 MiB

Specs = list[pl.BlockSpec | None]


def flash(
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    block: int = 512,
    interpret: bool = False,
) -> jax.Array:
    """out_BQHC in the dtype of `q`, as `attention.attend` defines it; logits, softmax and sums in float32.

    At most `block` queries meet as many keys at a time: a multiple of 128, or a smaller power of two where `interpret`
    runs the kernel without a TPU. Lengths need not be multiples of it. Queries and keys, where causal or biased,
    stand at an index known beforehand or, a device's part of a longer sequence, from `q_start` on.

    The bias goes by index, not by position: it needs position differences that equal index differences, key j and query
    i being `j - i - q_offset` apart, for every pair that sees each other. That is so where one sequence attends to
    itself, packed or not, as long as positions count up by one within a segment. Positions are known only when the
    program runs, so the caller vouches for it.
    """
    B, Q, H, C = q_BQHC.shape
    _, G, K, _ = k_BGKC.shape
    assert k_BGKC.shape == v_BGKC.shape == (B, G, K, C) and H % G == 0
    assert q_BQHC.dtype == k_BGKC.dtype == v_BGKC.dtype
    assert visibility.q_segments_BQ.shape == (B, Q) and visibility.k_segments_BK.shape == (B, K)
    assert visibility.q_offset >= 0
    assert visibility.bias is None or visibility.bias.table_HR.shape[0] == H
    assert block % LANES == 0 or (interpret and SUBLANES <= block < LANES and block.bit_count() == 1)
    if 0 in (B, Q, K):
        return jnp.zeros_like(q_BQHC)
    # All heads of a group stay in fast memory while its keys pass by: many of them, or wide ones, want shorter blocks.
    fitting = GROUP_BYTES // (H // G * C * q_BQHC.dtype.itemsize) // LANES * LANES
    block_q, block_k = even_block(Q, min(block, max(fitting, LANES))), even_block(K, block)
    plan = Plan(
        queries=multiple(Q, block_q),
        keys=multiple(K, block_k),
        block_q=block_q,
        block_k=block_k,
        causal=visibility.causal,
        prefix_length=visibility.prefix_length,
        interpret=interpret,
    )
    start = jnp.int32(visibility.q_offset) + (0 if visibility.q_start is None else visibility.q_start)
    q_BGMCQ = jnp.moveaxis((q_BQHC * scale).reshape(B, Q, G, H // G, C), 1, 4)
    out_BGMCQ = _flash(
        start[None],
        padded(q_BGMCQ, plan.queries, axis=-1),
        padded(k_BGKC.swapaxes(2, 3), plan.keys, axis=-1),
        padded(v_BGKC.swapaxes(2, 3), plan.keys, axis=-1),
        None if visibility.bias is None else distance_vector(visibility.bias, plan, start).reshape(G, H // G, 1, -1),
        padded(visibility.q_segments_BQ[:, None], plan.queries, axis=-1),
        padded(visibility.k_segments_BK[:, None], plan.keys, axis=-1),
        plan,
    )
    return jnp.moveaxis(out_BGMCQ[..., :Q], 4, 1).reshape(B, Q, H, C)


def distance_vector(bias: BiasTable, plan: Plan, start: jax.Array) -> jax.Array:
    """vector_HN (float32): the bias at every distance from `keys - start` down to `1 - queries - start`.

    >>> table = BiasTable(table_HR=jnp.arange(8.0)[None], bidirectional=True, max_distance=8)
    >>> known = dict(block_q=2, block_k=2, causal=False, prefix_length=0, interpret=True)
    >>> distance_vector(table, Plan(queries=4, keys=4, **known), jnp.int32(0)).tolist()
    [[7.0, 6.0, 6.0, 5.0, 0.0, 1.0, 2.0, 2.0]]
    """
    distance_N = plan.keys - start - jnp.arange(plan.queries + plan.keys, dtype=jnp.int32)
    bucket_N = relative_bucket(
        distance_N,
        bidirectional=bias.bidirectional,
        buckets=bias.table_HR.shape[1],
        max_distance=bias.max_distance,
    )
    return bias.table_HR.astype(jnp.float32)[:, bucket_N]


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _flash(
    start_1: jax.Array,
    q_BGMCQ: jax.Array,
    k_BGCK: jax.Array,
    v_BGCK: jax.Array,
    vector_GM1N: jax.Array | None,
    qseg_B1Q: jax.Array,
    kseg_B1K: jax.Array,
    plan: Plan,
) -> jax.Array:
    return _forward(start_1, q_BGMCQ, k_BGCK, v_BGCK, vector_GM1N, qseg_B1Q, kseg_B1K, plan)[0]


def _forward(start, q, k, v, vector, qseg, kseg, plan):  # type: ignore[no-untyped-def]
    operands = (start, qseg, kseg, q, k, v, vector)
    out, log_sum = (checkpoint_name(x, ATTENTION) for x in _out(plan, operands))
    return out, (start, q, k, v, vector, qseg, kseg, out, log_sum)


@partial(jax.jit, static_argnums=0)  # a kernel of its own would stay in a rematerialised program that does not want it
def _out(plan: Plan, operands: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    q, vector = operands[3], operands[6]
    B, G, M, C, Q = q.shape

    def keys(start: Any, i: Any, j: Any) -> Any:
        return jnp.minimum(j, plan.last_k_block(start, i))

    specs, a_query, _ = _specs(plan, q, vector, lambda start, i, j: i, keys)
    return pl.pallas_call(
        partial(kernels.forward_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, G, plan.q_blocks, plan.k_blocks),
            in_specs=specs,
            out_specs=[specs[2], a_query],
            scratch_shapes=[pltpu.VMEM((M, rows, plan.block_q), jnp.float32) for rows in (1, 1, C)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, G, M, 1, Q), jnp.float32),
        ],
        compiler_params=_parallel(3),
        cost_estimate=_cost(plan, operands, products=2),
        interpret=plan.interpret,
        name="flash_forward",
    )(*operands)


def _backward(plan, residuals, dout):  # type: ignore[no-untyped-def]
    start, q, k, v, vector, qseg, kseg, out, log_sum = residuals
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=3, keepdims=True)
    operands = (start, qseg, kseg, q, k, v, vector, dout, log_sum, delta)
    dq = _dq(plan, operands)
    dk, dv, dvector = _dkv(plan, operands)
    return None, dq, dk, dv, None if dvector is None else dvector.sum(axis=0), None, None


_flash.defvjp(_forward, _backward)


def _dq(plan: Plan, operands: tuple[Any, ...]) -> jax.Array:
    q, vector = operands[3], operands[6]
    B, G, M, C, _ = q.shape

    def keys(start: Any, i: Any, j: Any) -> Any:
        return jnp.minimum(j, plan.last_k_block(start, i))

    specs, a_query, _ = _specs(plan, q, vector, lambda start, i, j: i, keys)
    return pl.pallas_call(
        partial(kernels.dq_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, G, plan.q_blocks, plan.k_blocks),
            in_specs=[*specs, specs[2], a_query, a_query],
            out_specs=specs[2],
            scratch_shapes=[pltpu.VMEM((M, C, plan.block_q), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_parallel(3),
        cost_estimate=_cost(plan, operands, products=3),
        interpret=plan.interpret,
        name="flash_dq",
    )(*operands)


def _dkv(plan: Plan, operands: tuple[Any, ...]) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    q, k, v, vector = operands[3:7]
    B, G, _, C, _ = q.shape

    def queries(start: Any, j: Any, i: Any) -> Any:
        return jnp.maximum(i, plan.first_q_block(start, j))

    specs, a_query, of_row = _specs(plan, q, vector, queries, lambda start, j, i: j)
    dvector = None if vector is None else jax.ShapeDtypeStruct((B, *vector.shape), jnp.float32)
    return pl.pallas_call(
        partial(kernels.dkv_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, G, plan.k_blocks, plan.q_blocks),
            in_specs=[*specs, specs[2], a_query, a_query],
            out_specs=[specs[3], specs[4], of_row],
            scratch_shapes=[pltpu.VMEM((C, plan.block_k), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype), dvector],
        compiler_params=_parallel(2),
        cost_estimate=_cost(plan, operands, products=4),
        interpret=plan.interpret,
        name="flash_dkv",
    )(*operands)


def _specs(plan: Plan, q: jax.Array, vector: jax.Array | None, queries: Any, keys: Any) -> tuple[Specs, Any, Any]:
    """Blocks of the operands of all three kernels; of one number a query; and of a row's own gradient of the vector.

    `queries` and `keys` give the block of each for the first query's index and the last two numbers of the grid. Where
    nothing is seen they give the nearest block of which something is, so that none is fetched in vain.
    """
    _, _, M, C, _ = q.shape

    def spec(shape: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
        def block(b: Any, g: Any, i: Any, j: Any, start: Any) -> tuple[Any, ...]:
            return index(b, g, queries(start, i, j), keys(start, i, j))

        return pl.BlockSpec(shape, block)

    of_keys = spec((None, None, C, plan.block_k), lambda b, g, i, j: (b, g, 0, j))
    a_query = spec((None, None, M, 1, plan.block_q), lambda b, g, i, j: (b, g, 0, 0, i))
    specs = [
        spec((None, 1, plan.block_q), lambda b, g, i, j: (b, 0, i)),
        spec((None, 1, plan.block_k), lambda b, g, i, j: (b, 0, j)),
        spec((None, None, M, C, plan.block_q), lambda b, g, i, j: (b, g, 0, 0, i)),
        of_keys,
        of_keys,
    ]
    if vector is None:
        return [*specs, None], a_query, None
    of_group = spec((None, *vector.shape[1:]), lambda b, g, i, j: (g, 0, 0, 0))
    of_row = spec((None, None, *vector.shape[1:]), lambda b, g, i, j: (b, g, 0, 0, 0))
    return [*specs, of_group], a_query, of_row


def _cost(plan: Plan, operands: tuple[Any, ...], products: int) -> pl.CostEstimate:
    """For the compiler, which cannot look into a kernel and has to find what to send meanwhile; operands read once."""
    B, G, M, C, Q = operands[3].shape
    pairs = B * G * M * Q * plan.keys // (2 if plan.causal else 1)
    read = sum(x.size * x.dtype.itemsize for x in operands if x is not None)
    return pl.CostEstimate(flops=2 * products * pairs * C, transcendentals=pairs, bytes_accessed=read)


def _parallel(axes: int) -> pltpu.CompilerParams:
    """The first `axes` of the grid may go to different cores; the others share sums and come in order."""
    parallel, arbitrary = pltpu.GridDimensionSemantics.PARALLEL, pltpu.GridDimensionSemantics.ARBITRARY
    return pltpu.CompilerParams(dimension_semantics=[parallel] * axes + [arbitrary] * (4 - axes))
