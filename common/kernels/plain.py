"""Attention with all logits at once, and the parts it shares with attention in blocks.

Legend: B batch rows, Q query length, K key length, H heads, G key-value heads, M = H/G queries a key-value head, C head
dim, R relative buckets, X = M * Q.
"""

import jax
import jax.numpy as jnp

from common.kernels.visibility import MASKED, Visibility


def plain(q_BQHC: jax.Array, k_BGKC: jax.Array, v_BGKC: jax.Array, visibility: Visibility) -> jax.Array:
    """Returns out_BQHC; `q` is already scaled, and all logits exist at once."""
    B, Q, H, C = q_BQHC.shape
    logits_BGMQK, mask_B11QK = masked_logits(head_major(q_BQHC, k_BGKC.shape[1]), k_BGKC, visibility)
    shifted = logits_BGMQK - jax.lax.stop_gradient(logits_BGMQK.max(axis=-1, keepdims=True))
    weights_BGMQK = jnp.where(mask_B11QK, jnp.exp(shifted), 0.0)
    total_BGMQ1 = weights_BGMQK.sum(axis=-1, keepdims=True)
    out_BGMQC = grouped_einsum("BGXK,BGKC->BGXC", weights_BGMQK.astype(q_BQHC.dtype), v_BGKC)
    out_BGMQC /= nonzero(total_BGMQ1).astype(q_BQHC.dtype)
    return jnp.moveaxis(out_BGMQC, 3, 1).reshape(B, Q, H, C)


def masked_logits(q_BGMQC: jax.Array, k_BGKC: jax.Array, visibility: Visibility) -> tuple[jax.Array, jax.Array]:
    """Returns logits_BGMQK (float32, masked ones replaced by MASKED) and mask_B11QK."""
    logits_BGMQK = grouped_einsum("BGXC,BGKC->BGXK", q_BGMQC, k_BGKC, jnp.float32)
    if visibility.bias is not None:
        bias_BHQK = visibility.bias.expand(visibility.q_positions_BQ, visibility.k_positions_BK)
        logits_BGMQK += bias_BHQK.reshape(-1, *logits_BGMQK.shape[1:])
    mask_B11QK = visibility.mask_BQK()[:, None, None]
    return jnp.where(mask_B11QK, logits_BGMQK, MASKED), mask_B11QK


def grouped_einsum(spec: str, x_BGMQ_: jax.Array, y: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """Einsum of x_BGMQ_ and y with [M, Q] merged into one axis X, as all queries of a group share its keys."""
    B, G, M, Q, last = x_BGMQ_.shape
    out = jnp.einsum(spec, x_BGMQ_.reshape(B, G, M * Q, last), y, preferred_element_type=dtype)
    return out.reshape(B, G, M, Q, out.shape[-1])


def head_major(q_BQHC: jax.Array, groups: int) -> jax.Array:
    """Returns q_BGMQC: query heads grouped by the key-value head they share."""
    B, Q, H, C = q_BQHC.shape
    return jnp.moveaxis(q_BQHC.reshape(B, Q, groups, H // groups, C), 1, 3)


def nonzero(total: jax.Array) -> jax.Array:
    """Returns `total` with zeros replaced by 1, to divide by."""
    return jnp.where(total > 0, total, 1.0)
