"""The attention module: projections before and after the attention kernels.

Legend: B batch rows, L sequence, Q query length, K key length, D model, H heads, G key-value heads, C head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels.attention import attend
from common.kernels.choice import Implementation
from common.kernels.visibility import Visibility
from common.nn.layers import RMSNorm, bias
from common.nn.linear import project, unproject
from common.nn.parameters import Initialisers, param, use, use_bias
from common.nn.positions import rope
from common.recipe import Execution, Widths
from common.sharding.rules import all_gather_residual, constrain, reduce_scatter_residual


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Projected keys (after RoPE, if the recipe has it) and values; head-major, the layout that products need."""

    k_BGKC: jax.Array
    v_BGKC: jax.Array

    def insert(self, new: "KeysValues", index: jax.Array | None) -> "KeysValues":
        """Writes `new` at key index `index` (a visibility's `q_start`, which is not None where there is a cache)."""
        assert index is not None
        return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, index, axis=2), self, new)

    def after(self, memory: "KeysValues") -> "KeysValues":
        """Returns the keys of `memory`, then these."""
        return jax.tree.map(lambda first, x: jnp.concatenate([first, x], axis=2), memory, self)

    def extend(self, slots: int) -> "KeysValues":
        """Appends `slots` empty keys."""
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots), (0, 0))), self)


class Attention(nnx.Module):
    """Multi-head attention with grouped key-value heads; queries and keys may come from different sequences."""

    def __init__(self, widths: Widths, execution: Execution, init: Initialisers, *, rngs: nnx.Rngs):
        recipe = widths.recipe
        D, H, G, C = widths.d_model, widths.num_heads, widths.num_kv_heads, widths.head_dim
        self.rope_theta = recipe.rope_theta if recipe.positions == "rope" else None
        self.scale = (init.scaling.base_head_dim**-0.5 if recipe.scale_attention else 1.0) / init.scaling.head_dim
        self.dropout_rate = recipe.dropout
        self.implementation = Implementation(
            kind=execution.attention, block=execution.attention_block, kernel_block=execution.attention_kernel_block
        )
        self.query_DHC = param(rngs, init.query(D), (D, H, C), ("embed", "heads", "head_dim"))
        self.key_DGC = param(rngs, init.key_value(D), (D, G, C), ("embed", "kv_heads", "head_dim"))
        self.value_DGC = param(rngs, init.key_value(D), (D, G, C), ("embed", "kv_heads", "head_dim"))
        self.query_bias_HC = bias(rngs, recipe, (H, C), ("heads", "head_dim"))
        self.key_bias_GC = bias(rngs, recipe, (G, C), ("kv_heads", "head_dim"))
        self.value_bias_GC = bias(rngs, recipe, (G, C), ("kv_heads", "head_dim"))
        self.query_norm = RMSNorm(C, recipe.norm_epsilon, rngs=rngs, axis="head_dim") if recipe.qk_norm else None
        self.key_norm = RMSNorm(C, recipe.norm_epsilon, rngs=rngs, axis="head_dim") if recipe.qk_norm else None
        self.out_HCD = param(rngs, init.attention_out(H * C), (H, C, D), ("heads", "head_dim", "embed"))
        self.out_bias_D = bias(rngs, recipe, (D,), ("embed",))

    def keys_values(self, x_BKD: jax.Array, positions_BK: jax.Array) -> KeysValues:
        """Projects a sequence to its keys and values."""
        x_BKD = all_gather_residual(x_BKD)
        k_BKGC = project(x_BKD, use(self.key_DGC, x_BKD.dtype), use_bias(self.key_bias_GC, x_BKD.dtype))
        v_BKGC = project(x_BKD, use(self.value_DGC, x_BKD.dtype), use_bias(self.value_bias_GC, x_BKD.dtype))
        # Without this constraint, every device would project the whole sequence.
        k_BKGC, v_BKGC = (constrain(x, "batch", "length", "kv_heads", None) for x in (k_BKGC, v_BKGC))
        if self.key_norm is not None:
            k_BKGC = self.key_norm(k_BKGC)
        if self.rope_theta is not None:
            k_BKGC = rope(k_BKGC, positions_BK, self.rope_theta)
        k_BKGC, v_BKGC = (constrain(x, "batch", None, "kv_heads", None) for x in (k_BKGC, v_BKGC))
        return KeysValues(k_BKGC.swapaxes(1, 2), v_BKGC.swapaxes(1, 2))

    def __call__(
        self, x_BQD: jax.Array, memory: KeysValues, visibility: Visibility, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Attends from `x_BQD` to `memory`, as far as `visibility` allows; returns [B, Q, D]."""
        if memory.k_BGKC.shape[2] == 0:  # without keys, only the bias remains
            y_BQD, out_bias_D = jnp.zeros_like(x_BQD), use_bias(self.out_bias_D, x_BQD.dtype)
            return y_BQD if out_bias_D is None else y_BQD + out_bias_D[None, None]
        x_BQD = all_gather_residual(x_BQD)
        q_BQHC = project(x_BQD, use(self.query_DHC, x_BQD.dtype), use_bias(self.query_bias_HC, x_BQD.dtype))
        q_BQHC = constrain(q_BQHC, "batch", "length", "heads", None)
        if self.query_norm is not None:
            q_BQHC = self.query_norm(q_BQHC)
        if self.rope_theta is not None:
            q_BQHC = rope(q_BQHC, visibility.q_positions_BQ, self.rope_theta)
        out_BQHC = attend(
            q_BQHC,
            memory.k_BGKC,
            _drop_values(memory.v_BGKC, self.dropout_rate, dropout_key),
            visibility,
            scale=self.scale,
            implementation=self.implementation,
        )
        y_BQD = unproject(out_BQHC, use(self.out_HCD, x_BQD.dtype), use_bias(self.out_bias_D, x_BQD.dtype))
        return reduce_scatter_residual(y_BQD)


def _drop_values(v_BGKC: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Drops values instead of attention weights, so attention implementations need no dropout.

    As in T5X, all queries drop the same keys, so dropping a key's weights equals dropping its value. Query heads that
    share values also share the mask.
    """
    if key is None or rate == 0.0:
        return v_BGKC
    kept_BGK1 = jax.random.bernoulli(key, 1.0 - rate, (*v_BGKC.shape[:3], 1))
    return jnp.where(kept_BGK1, v_BGKC / (1.0 - rate), 0)
