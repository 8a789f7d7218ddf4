"""Position schemes: rotary embeddings, T5's relative bias, learned tables.

Legend: B batch rows (or 1), L sequence, H heads, C head dim, R relative buckets, S positions, D model.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels.bias import BiasTable
from common.nn.layers import Embedding
from common.nn.parameters import Initialisers, param, use
from common.recipe import Recipe


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rope(x_BLHC: jax.Array, positions_BL: jax.Array, theta: float) -> jax.Array:
    """Rotates the pairs (c, c + C/2) by `position * theta^(-2c/C)` (arXiv 2104.09864, in Llama's "half" layout).

    Angles and products are float32; the result has the dtype of `x_BLHC`. The gradient is rotated back by the same
    angles, so the backward pass needs only the positions.
    """
    return _rotate(x_BLHC, positions_BL, theta)


def _rope_forward(x_BLHC: jax.Array, positions_BL: jax.Array, theta: float) -> tuple[jax.Array, jax.Array]:
    return _rotate(x_BLHC, positions_BL, theta), positions_BL


def _rope_backward(theta: float, positions_BL: jax.Array, gradient_BLHC: jax.Array) -> tuple[jax.Array, None]:
    return _rotate(gradient_BLHC, -positions_BL, theta), None


rope.defvjp(_rope_forward, _rope_backward)


def _rotate(x_BLHC: jax.Array, positions_BL: jax.Array, theta: float) -> jax.Array:
    half = x_BLHC.shape[-1] // 2
    frequency_C = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BL1C = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None]
    cos, sin = jnp.cos(angle_BL1C), jnp.sin(angle_BL1C)
    # Halves are swapped before the cast: a swapped float32 copy would be a separate array of twice the size.
    swapped_BLHC = jnp.concatenate([x_BLHC[..., half:], x_BLHC[..., :half]], axis=-1)
    by_cos_BLHC = x_BLHC.astype(jnp.float32) * jnp.concatenate([cos, cos], axis=-1)
    by_sin_BLHC = swapped_BLHC.astype(jnp.float32) * jnp.concatenate([-sin, sin], axis=-1)
    return (by_cos_BLHC + by_sin_BLHC).astype(x_BLHC.dtype)


class RelativeBias(nnx.Module):
    """T5's table of relative biases, shared by all layers of a stack."""

    def __init__(self, num_heads: int, bidirectional: bool, recipe: Recipe, init: Initialisers, *, rngs: nnx.Rngs):
        self.bidirectional, self.max_distance = bidirectional, recipe.relative_max_distance
        shape = (num_heads, recipe.relative_buckets)
        self.table_HR = param(rngs, init.relative_bias(*shape), shape, ("heads", "buckets"))


def relative_bias(
    num_heads: int, sees_ahead: bool, recipe: Recipe, init: Initialisers, rngs: nnx.Rngs
) -> RelativeBias | None:
    """Makes the bias of a stack that does or does not see keys ahead of a query; None if the recipe has no T5 bias."""
    if recipe.positions != "t5_bias":
        return None
    bidirectional = sees_ahead if recipe.relative_sides == "as_seen" else recipe.relative_sides == "two"
    return RelativeBias(num_heads, bidirectional, recipe, init, rngs=rngs)


def bias_table(bias: RelativeBias | None) -> BiasTable | None:
    """Converts the module to the description that attention kernels take."""
    if bias is None:
        return None
    return BiasTable(
        table_HR=use(bias.table_HR, jnp.float32), bidirectional=bias.bidirectional, max_distance=bias.max_distance
    )


class LearnedPositions(nnx.Module):
    """One vector per position, added to the embedded tokens."""

    def __init__(self, max_positions: int, d_model: int, init: Initialisers, *, rngs: nnx.Rngs):
        shape = (max_positions, d_model)
        self.table_SD = param(rngs, init.positions(), shape, ("positions", "embed"))

    def __call__(self, positions_BL: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return use(self.table_SD, dtype)[positions_BL]


def learned_positions(
    max_positions: int | None, d_model: int, init: Initialisers, rngs: nnx.Rngs
) -> LearnedPositions | None:
    """Makes the table of learned positions; None if the recipe has another scheme."""
    return None if max_positions is None else LearnedPositions(max_positions, d_model, init, rngs=rngs)


def embed(
    embedding: Embedding, positions: LearnedPositions | None, tokens_BL: jax.Array, positions_BL: jax.Array, dtype: Any
) -> jax.Array:
    """Returns x_BLD: embedded tokens, plus their positions' vectors if these are learned."""
    x_BLD = embedding(tokens_BL, dtype)
    return x_BLD if positions is None else x_BLD + positions(positions_BL, dtype)
