"""Position schemes: rotary embeddings, T5's relative bias, learned tables.

Legend: B batch rows (or 1), L sequence, H heads, C head dim, R relative buckets, S positions, D model.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.kernels.bias import BiasTable
from common.nn.layers import Embedding
from common.nn.parameters import Initialisers, param, use
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
    num_heads: int, sees_ahead: bool, recipe: Recipe, init: Initialisers, rngs: nnx.Rngs
) -> RelativeBias | None:
    """The bias of stacks that see keys ahead of a query or do not; None where positions are of another scheme."""
    if recipe.positions != "t5_bias":
        return None
    bidirectional = sees_ahead if recipe.relative_sides == "as_seen" else recipe.relative_sides == "two"
    return RelativeBias(num_heads, bidirectional, recipe, init, rngs=rngs)


def bias_table(bias: RelativeBias | None) -> BiasTable | None:
    """The description that attention takes."""
    if bias is None:
        return None
    return BiasTable(
        table_HR=use(bias.table_HR, jnp.float32), bidirectional=bias.bidirectional, max_distance=bias.max_distance
    )


class LearnedPositions(nnx.Module):
    """One vector a position, added to the embedded tokens."""

    def __init__(self, max_positions: int, d_model: int, init: Initialisers, *, rngs: nnx.Rngs):
        shape = (max_positions, d_model)
        self.table_SD = param(rngs, init.positions(d_model), shape, ("positions", "embed"))

    def __call__(self, positions_BL: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return use(self.table_SD, dtype)[positions_BL]


def learned_positions(
    max_positions: int | None, d_model: int, init: Initialisers, rngs: nnx.Rngs
) -> LearnedPositions | None:
    """None where positions are of another scheme."""
    return None if max_positions is None else LearnedPositions(max_positions, d_model, init, rngs=rngs)


def embed(
    embedding: Embedding, positions: LearnedPositions | None, tokens_BL: jax.Array, positions_BL: jax.Array, dtype: Any
) -> jax.Array:
    """x_BLD: tokens, and their positions where these are learned."""
    x_BLD = embedding(tokens_BL, dtype)
    return x_BLD if positions is None else x_BLD + positions(positions_BL, dtype)
