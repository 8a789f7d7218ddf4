"""Position schemes: rotary embeddings and T5's bucketed relative bias.

Legend: B batch rows (or 1), L sequence, Q query length, K key length, H heads, C head dim, R relative buckets.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.parameters import Initialisers, param
from common.nn.recipe import Recipe


def rope(x_BLHC: jax.Array, positions_BL: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs (c, c + C/2) by `position * theta^(-2c/C)` (arXiv 2104.09864, "half" layout as in Llama); float32 inside."""
    half = x_BLHC.shape[-1] // 2
    frequency_C = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BL1C = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None]
    cos, sin = jnp.cos(angle_BL1C), jnp.sin(angle_BL1C)
    x32 = x_BLHC.astype(jnp.float32)
    first, second = x32[..., :half], x32[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHC.dtype)


def relative_bucket(distance: jax.Array, *, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """T5's bucket of `distance` = key position - query position (int32, any shape); arXiv 1910.10683 section 2.1 and its code.

    Half of the buckets (per direction) are exact, the rest grow logarithmically up to `max_distance`.

    >>> import jax.numpy as jnp
    >>> relative_bucket(jnp.array([-200, -9, -1, 0, 1, 9]), bidirectional=True, buckets=32, max_distance=128).tolist()
    [15, 8, 1, 0, 17, 24]
    >>> relative_bucket(jnp.array([-200, -9, -1, 0, 1, 9]), bidirectional=False, buckets=32, max_distance=128).tolist()
    [31, 9, 1, 0, 0, 0]
    """
    offset = jnp.zeros_like(distance)
    behind = -distance
    if bidirectional:
        buckets //= 2
        offset = jnp.where(behind < 0, buckets, 0)
        behind = jnp.abs(behind)
    else:
        behind = jnp.maximum(behind, 0)
    exact = buckets // 2
    ratio = jnp.maximum(behind, exact).astype(jnp.float32) / exact
    # The epsilon (float32's, as in T5's code) decides exact powers at the bucket borders.
    steps = jnp.log(ratio + jnp.finfo(jnp.float32).eps) / math.log(max_distance / exact) * (buckets - exact)
    far = jnp.minimum(exact + steps.astype(jnp.int32), buckets - 1)
    return offset + jnp.where(behind < exact, behind, far)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasTable:
    """T5's relative bias as a description: an attention implementation expands it where it needs it."""

    table_HR: jax.Array
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    max_distance: int = dataclasses.field(metadata={"static": True})

    def expand(self, q_positions_BQ: jax.Array, k_positions_BK: jax.Array) -> jax.Array:
        """bias_BHQK (float32) to add to the attention logits."""
        bucket_BQK = relative_bucket(
            k_positions_BK[:, None, :] - q_positions_BQ[:, :, None],
            bidirectional=self.bidirectional,
            buckets=self.table_HR.shape[1],
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(self.table_HR[:, bucket_BQK], 0, 1)


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
