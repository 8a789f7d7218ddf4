"""Attention implementations and the choice among them.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, M = H/G queries a key-value head, C head
dim, R relative buckets, X = M * Q.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from common.kernels.visibility import MASKED, Visibility


def attend(
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    block: int | None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """out_BQHC in the dtype of `q`; logits and softmax in float32.

    A query that sees no key gets exactly 0, with gradient 0. Masked logits are replaced, never added to, so that no key
    of a stranger, however large, can leak. `block` queries are taken at a time; None, decoding, and dropout on the
    attention weights take the plain implementation, which holds all logits at once. Several rows of queries in turn
    may share a row of keys, as the beams of a prompt do; then nothing may be causal.
    """
    if q_BQHC.shape[0] != k_BGKC.shape[0]:
        rows = k_BGKC.shape[0]
        out_BQHC = attend(
            q_BQHC.reshape(rows, -1, *q_BQHC.shape[2:]),
            k_BGKC,
            v_BGKC,
            visibility.gathered(rows),
            scale=scale,
            block=block,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
        return out_BQHC.reshape(q_BQHC.shape)
    if 0 in (q_BQHC.shape[1], k_BGKC.shape[2]):
        return jnp.zeros_like(q_BQHC)
    q_BQHC = q_BQHC * scale
    dropping = dropout_key is not None and dropout_rate > 0.0
    fits = q_BQHC.shape[1] > 1 and (visibility.placed or not visibility.causal)
    if block is None or dropping or not fits:
        return plain(q_BQHC, k_BGKC, v_BGKC, visibility, dropout_rate, dropout_key if dropping else None)
    return blocked(q_BQHC, k_BGKC, v_BGKC, visibility, block)


def plain(
    q_BQHC: jax.Array,
    k_BGKC: jax.Array,
    v_BGKC: jax.Array,
    visibility: Visibility,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """All logits at once; queries are scaled already."""
    B, Q, H, C = q_BQHC.shape
    logits_BGMQK, mask_B11QK = _logits(_head_major(q_BQHC, k_BGKC.shape[1]), k_BGKC, visibility)
    shifted = logits_BGMQK - jax.lax.stop_gradient(logits_BGMQK.max(axis=-1, keepdims=True))
    weights_BGMQK = jnp.where(mask_B11QK, jnp.exp(shifted), 0.0)
    total_BGMQ1 = weights_BGMQK.sum(axis=-1, keepdims=True)
    if dropout_key is not None:
        # One mask for all queries, as T5X draws it.
        shape = (*weights_BGMQK.shape[:3], 1, weights_BGMQK.shape[-1])
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, shape)
        weights_BGMQK = jnp.where(kept, weights_BGMQK / (1.0 - dropout_rate), 0.0)
    out_BGMQC = _weighted("BGXK,BGKC->BGXC", weights_BGMQK.astype(q_BQHC.dtype), v_BGKC)
    out_BGMQC /= _or_one(total_BGMQ1).astype(q_BQHC.dtype)
    return jnp.moveaxis(out_BGMQC, 3, 1).reshape(B, Q, H, C)


def blocked(q_BQHC: jax.Array, k_BGKC: jax.Array, v_BGKC: jax.Array, visibility: Visibility, block: int) -> jax.Array:
    """A block of queries at a time against the keys it can reach; the backward pass recomputes the weights.

    The memory-saving scheme of FlashAttention (arXiv 2205.14135) over query blocks: kept for the backward pass are the
    output and one log-sum a query. Causal attention skips the keys behind each block, about half of them.
    """
    table_HR = None if visibility.bias is None else visibility.bias.table_HR
    out_BGMQC = _blocked(_head_major(q_BQHC, k_BGKC.shape[1]), k_BGKC, v_BGKC, table_HR, visibility, block)
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
        logits, mask = _logits(q[..., begin:end, :], k[:, :, :last], here)
        peak = logits.max(axis=-1, keepdims=True)
        weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
        total = _or_one(weights.sum(axis=-1, keepdims=True))
        out = _weighted("BGXK,BGKC->BGXC", weights.astype(q.dtype), v[:, :, :last])
        outs.append(out / total.astype(q.dtype))
        log_sums.append(peak + jnp.log(total))
    out, log_sum = jnp.concatenate(outs, axis=3), jnp.concatenate(log_sums, axis=3)
    return out, (q, k, v, table_HR, visibility, out, log_sum)


def _blocked_backward(block, residuals, dout):  # type: ignore[no-untyped-def]
    q, k, v, table_HR, visibility, out, log_sum = residuals
    delta = (dout * out).astype(jnp.float32).sum(axis=-1, keepdims=True)
    dq_blocks, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dtable: Any = None if table_HR is None else jnp.zeros_like(table_HR)
    for begin, end, last in _blocks(visibility, q.shape[3], block):
        here, rows = visibility.block(begin, end, last), (..., slice(begin, end), slice(None))
        k_here, v_here = k[:, :, :last], v[:, :, :last]
        logits, mask = _logits(q[rows], k_here, here)
        weights = jnp.where(mask, jnp.exp(logits - log_sum[rows]), 0.0)
        dweights = _weighted("BGXC,BGKC->BGXK", dout[rows], v_here, jnp.float32)
        dlogits = weights * (dweights - delta[rows])
        if table_HR is not None:
            dtable += _table_gradient(here, dlogits)
        weights, dlogits = weights.astype(q.dtype), dlogits.astype(q.dtype)
        dq_blocks.append(_weighted("BGXK,BGKC->BGXC", dlogits, k_here))
        behind = ((0, 0), (0, 0), (0, k.shape[2] - last), (0, 0))
        dk += jnp.pad(_over_queries(dlogits, q[rows]), behind)
        dv += jnp.pad(_over_queries(weights, dout[rows]), behind)
    return jnp.concatenate(dq_blocks, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), dtable, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocks(visibility: Visibility, queries: int, block: int) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of the keys they can reach) of each block."""
    ends = [min(begin + block, queries) for begin in range(0, queries, block)]
    return [(begin, end, visibility.last_key(end)) for begin, end in zip(range(0, queries, block), ends, strict=True)]


def _logits(q_BGMQC: jax.Array, k_BGKC: jax.Array, visibility: Visibility) -> tuple[jax.Array, jax.Array]:
    """logits_BGMQK (float32, masked ones replaced) and mask_B11QK."""
    logits = _weighted("BGXC,BGKC->BGXK", q_BGMQC, k_BGKC, jnp.float32)
    if visibility.bias is not None:
        bias_BHQK = visibility.bias.expand(visibility.q_positions_BQ, visibility.k_positions_BK)
        logits += bias_BHQK.reshape(-1, *logits.shape[1:])
    mask_B11QK = visibility.mask_BQK()[:, None, None]
    return jnp.where(mask_B11QK, logits, MASKED), mask_B11QK


def _weighted(spec: str, x_BGMQ_: jax.Array, y: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """A batched product with [M, Q] taken as one axis X, as queries of one group share their keys."""
    B, G, M, Q, last = x_BGMQ_.shape
    out = jnp.einsum(spec, x_BGMQ_.reshape(B, G, M * Q, last), y, preferred_element_type=dtype)
    return out.reshape(B, G, M, Q, out.shape[-1])


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


def _head_major(q_BQHC: jax.Array, groups: int) -> jax.Array:
    """[B, G, M, Q, C]."""
    B, Q, H, C = q_BQHC.shape
    return jnp.moveaxis(q_BQHC.reshape(B, Q, groups, H // groups, C), 1, 3)


def _or_one(total: jax.Array) -> jax.Array:
    return jnp.where(total > 0, total, 1.0)
