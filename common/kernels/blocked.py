"""Attention for one block of queries at a time, in plain XLA.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, M = H/G queries a key-value head, C head
dim, R relative buckets, X = M * Q.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from common.kernels.plain import grouped_einsum, head_major, masked_logits, nonzero
from common.kernels.visibility import ATTENTION, Visibility


def blocked(q_BQHC: jax.Array, k_BGKC: jax.Array, v_BGKC: jax.Array, visibility: Visibility, block: int) -> jax.Array:
    """Returns out_BQHC, computed for `block` queries at a time against the keys they can see; `q` is already scaled.

    Saves memory as FlashAttention does (arXiv 2205.14135), over query blocks: only the output and one log-sum per query
    are kept for the backward pass, which recomputes the weights. Causal attention skips the keys after each block,
    about half of all.
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
    for begin, end, k_end in _blocks(visibility, q.shape[3], block):
        visible = visibility.block(begin, end, k_end)
        logits, mask = masked_logits(q[..., begin:end, :], k[:, :, :k_end], visible)
        peak = logits.max(axis=-1, keepdims=True)
        weights = jnp.where(mask, jnp.exp(logits - peak), 0.0)
        total = nonzero(weights.sum(axis=-1, keepdims=True))
        out = grouped_einsum("BGXK,BGKC->BGXC", weights.astype(q.dtype), v[:, :, :k_end])
        outs.append(out / total.astype(q.dtype))
        log_sums.append(peak + jnp.log(total))
    out, log_sum = (checkpoint_name(jnp.concatenate(x, axis=3), ATTENTION) for x in (outs, log_sums))
    return out, (q, k, v, table_HR, visibility, out, log_sum)


def _blocked_backward(block, residuals, dout):  # type: ignore[no-untyped-def]
    q, k, v, table_HR, visibility, out, log_sum = residuals
    delta = (dout * out).astype(jnp.float32).sum(axis=-1, keepdims=True)
    dq_blocks, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dtable: Any = None if table_HR is None else jnp.zeros_like(table_HR)
    for begin, end, k_end in _blocks(visibility, q.shape[3], block):
        visible, rows = visibility.block(begin, end, k_end), (..., slice(begin, end), slice(None))
        k_block, v_block = k[:, :, :k_end], v[:, :, :k_end]
        logits, mask = masked_logits(q[rows], k_block, visible)
        weights = jnp.where(mask, jnp.exp(logits - log_sum[rows]), 0.0)
        dweights = grouped_einsum("BGXC,BGKC->BGXK", dout[rows], v_block, jnp.float32)
        dlogits = weights * (dweights - delta[rows])
        if table_HR is not None:
            dtable += _table_gradient(visible, dlogits)
        weights, dlogits = weights.astype(q.dtype), dlogits.astype(q.dtype)
        dq_blocks.append(grouped_einsum("BGXK,BGKC->BGXC", dlogits, k_block))
        unseen = ((0, 0), (0, 0), (0, k.shape[2] - k_end), (0, 0))
        dk += jnp.pad(_over_queries(dlogits, q[rows]), unseen)
        dv += jnp.pad(_over_queries(weights, dout[rows]), unseen)
    return jnp.concatenate(dq_blocks, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), dtable, None


_blocked.defvjp(_blocked_forward, _blocked_backward)


def _blocks(visibility: Visibility, queries: int, block: int) -> list[tuple[int, int, int]]:
    """(first query, end of queries, end of the keys they may see) of each block."""
    ends = [min(begin + block, queries) for begin in range(0, queries, block)]
    return [(begin, end, visibility.keys_end(end)) for begin, end in zip(range(0, queries, block), ends, strict=True)]


def _over_queries(x_BGMQK: jax.Array, y_BGMQC: jax.Array) -> jax.Array:
    """The product summed over [M, Q], [B, G, K, C] in float32."""
    return jnp.einsum("BGMQK,BGMQC->BGKC", x_BGMQK, y_BGMQC, preferred_element_type=jnp.float32)


def _table_gradient(visibility: Visibility, dlogits_BGMQK: jax.Array) -> jax.Array:
    """dtable_HR: the gradient of the bias's table, through its expansion for this block."""
    bias = visibility.bias
    assert bias is not None
    B, G, M, Q, K = dlogits_BGMQK.shape

    def expand(table_HR: jax.Array) -> jax.Array:
        with_table = dataclasses.replace(bias, table_HR=table_HR)
        bias_BHQK = with_table.expand(visibility.q_positions_BQ, visibility.k_positions_BK)
        return jnp.broadcast_to(bias_BHQK, (B, G * M, Q, K))

    _, backward = jax.vjp(expand, bias.table_HR)
    return backward(dlogits_BGMQK.reshape(B, G * M, Q, K))[0]
