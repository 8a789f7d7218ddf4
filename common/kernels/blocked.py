"""Attention for a block of queries at a time, in plain XLA.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, M = H/G queries a key-value head, C head
dim, R relative buckets, X = M * Q.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from common.kernels.plain import head_major, masked_logits, or_one, weighted
from common.kernels.visibility import ATTENTION, Visibility


def blocked(q_BQHC: jax.Array, k_BGKC: jax.Array, v_BGKC: jax.Array, visibility: Visibility, block: int) -> jax.Array:
    """A block of queries at a time against the keys it can reach; the backward pass recomputes the weights.

    The memory-saving scheme of FlashAttention (arXiv 2205.14135) over query blocks: kept for the backward pass are the
    output and one log-sum a query. Causal attention skips the keys behind each block, about half of them.
    """
    table_HR = None if visibility.bias is None else visibility.bias.table_HR
    out_BGMQC = _blocked(head_major(q_BQHC, k_BGKC.shape[1]), k_BGKC, v_BGKC, table_HR, visibility, block)
    return jnp.moveaxis(out_BGMQC, 3, 1).reshape(q_BQHC.shape)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _blocked(
    q_BGMQC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    table_HR: jax.Array | None,
    visibility: Visibility,
    block: int,
) -> jax.Array:
    return _blocked_forward(q_BGMQC, k_BGKC, v_BGKC, table_HR, visibility, block)[0]


def _blocked_forward(q, k, v, table_HR, visibility, block):  # type: ignore[no-untyped-def]
    outs, log_sums = [], []
    for begin, end, last in _blocks(visibility, q.shape[3], block):
        here = visibility.block(begin, end, last)
        logits, mask = masked_logits(q[..., begin:end, :], k[:, :, :last], here)
        peak = logits.max(axis=-1, keepdims=True)
        weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
        total = or_one(weights.sum(axis=-1, keepdims=True))
        out = weighted("BGXK,BGKC->BGXC", weights.astype(q.dtype), v[:, :, :last])
        outs.append(out / total.astype(q.dtype))
        log_sums.append(peak + jnp.log(total))
    out, log_sum = (checkpoint_name(jnp.concatenate(x, axis=3), ATTENTION) for x in (outs, log_sums))
    return out, (q, k, v, table_HR, visibility, out, log_sum)


def _blocked_backward(block, residuals, dout):  # type: ignore[no-untyped-def]
    q, k, v, table_HR, visibility, out, log_sum = residuals
    delta = (dout * out).astype(jnp.float32).sum(axis=-1, keepdims=True)
    dq_blocks, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dtable: Any = None if table_HR is None else jnp.zeros_like(table_HR)
    for begin, end, last in _blocks(visibility, q.shape[3], block):
        here, rows = visibility.block(begin, end, last), (..., slice(begin, end), slice(None))
        k_here, v_here = k[:, :, :last], v[:, :, :last]
        logits, mask = masked_logits(q[rows], k_here, here)
        weights = jnp.where(mask, jnp.exp(logits - log_sum[rows]), 0.0)
        dweights = weighted("BGXC,BGKC->BGXK", dout[rows], v_here, jnp.float32)
        dlogits = weights * (dweights - delta[rows])
        if table_HR is not None:
            dtable += _table_gradient(here, dlogits)
        weights, dlogits = weights.astype(q.dtype), dlogits.astype(q.dtype)
        dq_blocks.append(weighted("BGXK,BGKC->BGXC", dlogits, k_here))
        behind = ((0, 0), (0, 0), (0, k.shape[2] - last), (0, 0))
        dk += jnp.pad(_over_queries(dlogits, q[rows]), behind)
        dv += jnp.pad(_over_queries(weights, dout[rows]), behind)
    return jnp.concatenate(dq_blocks, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), dtable, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocks(visibility: Visibility, queries: int, block: int) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of the keys they can reach) of each block."""
    ends = [min(begin + block, queries) for begin in range(0, queries, block)]
    return [(begin, end, visibility.last_key(end)) for begin, end in zip(range(0, queries, block), ends, strict=True)]


def _over_queries(x_BGMQK: jax.Array, y_BGMQC: jax.Array) -> jax.Array:
    """sum over [M, Q]: [B, G, K, C] in float32."""
    return jnp.einsum("BGMQK,BGMQC->BGKC", x_BGMQK, y_BGMQC, preferred_element_type=jnp.float32)


def _table_gradient(visibility: Visibility, dlogits_BGMQK: jax.Array) -> jax.Array:
    bias = visibility.bias
    assert bias is not None
    B, G, M, Q, K = dlogits_BGMQK.shape

    def expand(table_HR: jax.Array) -> jax.Array:
        with_table = dataclasses.replace(bias, table_HR=table_HR)
        bias_BHQK = with_table.expand(visibility.q_positions_BQ, visibility.k_positions_BK)
        return jnp.broadcast_to(bias_BHQK, (B, G * M, Q, K))

    _, backward = jax.vjp(expand, bias.table_HR)
    return backward(dlogits_BGMQK.reshape(B, G * M, Q, K))[0]
