"""The attention module: projections around the kernels.

Legend: B batch rows, L sequence, Q query length, K key length, D model, H heads, G key-value heads, C head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels.attention import attend
from common.kernels.visibility import Visibility
from common.nn.linear import project, unproject
from common.nn.parameters import Initialisers, param
from common.nn.positions import rope
from common.nn.recipe import Execution, Recipe
from common.sharding.rules import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Projected keys (rotated already, where RoPE is used) and values."""

    k_BKGC: jax.Array
    v_BKGC: jax.Array

    def insert(self, new: "KeysValues", index: jax.Array | int | None) -> "KeysValues":
        """A cache with `new` written from key index `index` on (a visibility's `q_start`, which caching needs)."""
        assert index is not None
        return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, index, axis=1), self, new)

    def extend(self, slots: int) -> "KeysValues":
        """With `slots` empty keys behind the present ones."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, slots), (0, 0), (0, 0))), self)


class Attention(nnx.Module):
    """Multi-head attention with grouped key-value heads; queries and keys may come from different sequences."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        recipe: Recipe,
        execution: Execution,
        init: Initialisers,
        *,
        rngs: nnx.Rngs,
    ):
        self.rope_theta = recipe.rope_theta if recipe.positions == "rope" else None
        self.scale = head_dim**-0.5 if recipe.scale_attention else 1.0
        self.dropout_rate = recipe.dropout
        self.block = execution.attention_block if execution.attention == "blocked" else None
        D, H, G, C = d_model, num_heads, num_kv_heads, head_dim
        self.query_DHC = param(rngs, init.query(D, C), (D, H, C), ("embed", "heads", "head_dim"))
        self.key_DGC = param(rngs, init.key_value(D), (D, G, C), ("embed", "kv_heads", "head_dim"))
        self.value_DGC = param(rngs, init.key_value(D), (D, G, C), ("embed", "kv_heads", "head_dim"))
        self.out_HCD = param(rngs, init.attention_out(H * C), (H, C, D), ("heads", "head_dim", "embed"))

    def keys_values(self, x_BKD: jax.Array, positions_BK: jax.Array) -> KeysValues:
        k_BKGC = constrain(project(x_BKD, self.key_DGC[...]), "batch", None, "kv_heads", None)
        v_BKGC = constrain(project(x_BKD, self.value_DGC[...]), "batch", None, "kv_heads", None)
        if self.rope_theta is not None:
            k_BKGC = rope(k_BKGC, positions_BK, self.rope_theta)
        return KeysValues(k_BKGC, v_BKGC)

    def __call__(
        self, x_BQD: jax.Array, memory: KeysValues, visibility: Visibility, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        q_BQHC = constrain(project(x_BQD, self.query_DHC[...]), "batch", None, "heads", None)
        if self.rope_theta is not None:
            q_BQHC = rope(q_BQHC, visibility.q_positions_BQ, self.rope_theta)
        out_BQHC = attend(
            q_BQHC,
            memory.k_BKGC,
            memory.v_BKGC,
            visibility,
            scale=self.scale,
            block=self.block,
            dropout_rate=self.dropout_rate,
            dropout_key=dropout_key,
        )
        return unproject(out_BQHC, self.out_HCD[...])
