"""Attention over a description of what may be seen.

Legend: B batch rows, Q query length, K key length, D model, H heads, G key-value heads, M = H/G queries a key-value head,
C head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.parameters import Initialisers, param
from common.nn.positions import BiasTable, rope
from common.nn.recipe import Recipe
from common.sharding.rules import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
    """Which keys a query may see, and at what distance they stand; never a dense mask, so that kernels can choose.

    A query sees a key when both have the same non-zero segment id and, where `causal`, the key's index is not after the
    query's, or is below `prefix_length` together with the query's. Index means place in the sequence (the query block begins
    at `q_start` of the keys); position means place in the text, and is what RoPE and relative bias use.
    """

    q_segments_BQ: jax.Array
    k_segments_BK: jax.Array
    q_positions_BQ: jax.Array
    k_positions_BK: jax.Array
    causal: bool = dataclasses.field(metadata={"static": True})
    prefix_length: int = dataclasses.field(default=0, metadata={"static": True})
    q_start: jax.Array | int = 0
    bias: BiasTable | None = None

    def mask_BQK(self) -> jax.Array:
        same = self.q_segments_BQ[:, :, None] == self.k_segments_BK[:, None, :]
        mask = same & (self.k_segments_BK != 0)[:, None, :]
        if not self.causal:
            return mask
        q_index = self.q_start + jnp.arange(self.q_segments_BQ.shape[1], dtype=jnp.int32)[:, None]
        k_index = jnp.arange(self.k_segments_BK.shape[1], dtype=jnp.int32)[None, :]
        seen = k_index <= q_index
        if self.prefix_length:
            seen |= jnp.maximum(k_index, q_index) < self.prefix_length
        return mask & seen[None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Projected keys (rotated already, where RoPE is used) and values."""

    k_BKGC: jax.Array
    v_BKGC: jax.Array

    def insert(self, new: "KeysValues", index: jax.Array | int) -> "KeysValues":
        """A cache with `new` written from key index `index` on."""
        return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, index, axis=1), self, new)

    def extend(self, slots: int) -> "KeysValues":
        """With `slots` empty keys behind the present ones."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, slots), (0, 0), (0, 0))), self)


def attend(
    q_BQHC: jax.Array,
    memory: KeysValues,
    visibility: Visibility,
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """out_BQHC in the dtype of `q`; logits and softmax in float32.

    A query that sees no key gets exactly 0, with gradient 0. Masked logits are replaced, never added to, so that no key
    of a stranger, however large, can leak.
    """
    B, Q, H, C = q_BQHC.shape
    G = memory.k_BKGC.shape[2]
    q_BQGMC = (q_BQHC * scale).reshape(B, Q, G, H // G, C)
    logits_BGMQK = jnp.einsum("BQGMC,BKGC->BGMQK", q_BQGMC, memory.k_BKGC, preferred_element_type=jnp.float32)
    if visibility.bias is not None:
        bias_BHQK = visibility.bias.expand(visibility.q_positions_BQ, visibility.k_positions_BK)
        logits_BGMQK += bias_BHQK.reshape(-1, G, H // G, *bias_BHQK.shape[2:])
    mask_B11QK = visibility.mask_BQK()[:, None, None]
    logits_BGMQK = jnp.where(mask_B11QK, logits_BGMQK, jnp.finfo(jnp.float32).min)
    shifted = logits_BGMQK - jax.lax.stop_gradient(logits_BGMQK.max(axis=-1, keepdims=True))
    weights_BGMQK = jnp.where(mask_B11QK, jnp.exp(shifted), 0.0)
    total_BGMQ = weights_BGMQK.sum(axis=-1)
    if dropout_key is not None and dropout_rate > 0.0:
        # One mask for all queries, as T5X draws it.
        kept = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, (B, G, H // G, 1, weights_BGMQK.shape[-1]))
        weights_BGMQK = jnp.where(kept, weights_BGMQK / (1.0 - dropout_rate), 0.0)
    out_BQGMC = jnp.einsum("BGMQK,BKGC->BQGMC", weights_BGMQK.astype(q_BQHC.dtype), memory.v_BKGC)
    total_BQGM1 = jnp.moveaxis(jnp.where(total_BGMQ > 0, total_BGMQ, 1.0), 3, 1)[..., None]
    return (out_BQGMC / total_BQGM1.astype(q_BQHC.dtype)).reshape(B, Q, H, C)


class Attention(nnx.Module):
    """Multi-head attention with grouped key-value heads; queries and keys may come from different sequences."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        recipe: Recipe,
        init: Initialisers,
        *,
        rngs: nnx.Rngs,
    ):
        self.rope_theta = recipe.rope_theta if recipe.positions == "rope" else None
        self.scale = head_dim**-0.5 if recipe.scale_attention else 1.0
        self.dropout_rate = recipe.dropout
        D, H, G, C = d_model, num_heads, num_kv_heads, head_dim
        self.query_DHC = param(rngs, init.query(D, C), (D, H, C), ("embed", "heads", "head_dim"))
        self.key_DGC = param(rngs, init.key_value(D), (D, G, C), ("embed", "kv_heads", "head_dim"))
        self.value_DGC = param(rngs, init.key_value(D), (D, G, C), ("embed", "kv_heads", "head_dim"))
        self.out_HCD = param(rngs, init.attention_out(H * C), (H, C, D), ("heads", "head_dim", "embed"))

    def keys_values(self, x_BKD: jax.Array, positions_BK: jax.Array) -> KeysValues:
        k_BKGC = constrain(_project(x_BKD, self.key_DGC), "batch", None, "kv_heads", None)
        v_BKGC = constrain(_project(x_BKD, self.value_DGC), "batch", None, "kv_heads", None)
        if self.rope_theta is not None:
            k_BKGC = rope(k_BKGC, positions_BK, self.rope_theta)
        return KeysValues(k_BKGC, v_BKGC)

    def __call__(
        self, x_BQD: jax.Array, memory: KeysValues, visibility: Visibility, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        q_BQHC = constrain(_project(x_BQD, self.query_DHC), "batch", None, "heads", None)
        if self.rope_theta is not None:
            q_BQHC = rope(q_BQHC, visibility.q_positions_BQ, self.rope_theta)
        out_BQHC = attend(
            q_BQHC, memory, visibility, scale=self.scale, dropout_rate=self.dropout_rate, dropout_key=dropout_key
        )
        H, C, D = self.out_HCD.shape
        return out_BQHC.reshape(*x_BQD.shape[:2], H * C) @ self.out_HCD.reshape(H * C, D).astype(x_BQD.dtype)


def _project(x_BLD: jax.Array, w_DHC: nnx.Param) -> jax.Array:
    """x_BLHC by one two-dimensional product, which CPU and TPU backends both run best."""
    D, H, C = w_DHC.shape
    return (x_BLD @ w_DHC.reshape(D, H * C).astype(x_BLD.dtype)).reshape(*x_BLD.shape[:2], H, C)
