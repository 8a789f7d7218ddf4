"""Position schemes: rotary embeddings and T5's relative bias.

Legend: B batch rows (or 1), L sequence, H heads, C head dim, R relative buckets.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels.bias import BiasTable
from common.nn.parameters import Initialisers, param
from common.nn.recipe import Recipe


def rope(x_BLHC: jax.Array, positions_BL: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs (c, c + C/2) by `position * theta^(-2c/C)`, float32 inside (2104.09864, Llama's "half" layout)."""
    half = x_BLHC.shape[-1] // 2
    frequency_C = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BL1C = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None]
    cos, sin = jnp.cos(angle_BL1C), jnp.sin(angle_BL1C)
    x32 = x_BLHC.astype(jnp.float32)
    first, second = x32[..., :half], x32[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHC.dtype)


class RelativeBias(nnx.Module):
    """One table for all layers of a stack."""

    def __init__(self, num_heads: int, bidirectional: bool, recipe: Recipe, init: Initialisers, *, rngs: nnx.Rngs):
        self.bidirectional, self.max_distance = bidirectional, recipe.relative_max_distance
        shape = (num_heads, recipe.relative_buckets)
        self.table_HR = param(rngs, init.relative_bias(*shape), shape, ("heads", "buckets"))


def relative_bias(
    num_heads: int, bidirectional: bool, recipe: Recipe, init: Initialisers, rngs: nnx.Rngs
) -> RelativeBias | None:
    """A stack's bias under a recipe, None where its positions are of another scheme."""
    if recipe.positions != "t5_bias":
        return None
    return RelativeBias(num_heads, bidirectional, recipe, init, rngs=rngs)


def bias_table(bias: RelativeBias | None) -> BiasTable | None:
    """The description that attention takes."""
    if bias is None:
        return None
    return BiasTable(table_HR=bias.table_HR[...], bidirectional=bias.bidirectional, max_distance=bias.max_distance)
