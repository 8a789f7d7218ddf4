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
    """Rotates pairs (c, c + C/2) by `position * theta^(-2c/C)`, float32 inside (2104.09864, Llama's "half" layout).

    The gradient is turned back by the same angles, so that nothing is kept but positions.
    """
    return _rotated(x_BLHC, positions_BL, theta)


def _rope_forward(x_BLHC: jax.Array, positions_BL: jax.Array, theta: float) -> tuple[jax.Array, jax.Array]:
    return _rotated(x_BLHC, positions_BL, theta), positions_BL


def _rope_backward(theta: float, positions_BL: jax.Array, gradient_BLHC: jax.Array) -> tuple[jax.Array, None]:
    return _rotated(gradient_BLHC, -positions_BL, theta), None


rope.defvjp(_rope_forward, _rope_backward)


def _rotated(x_BLHC: jax.Array, positions_BL: jax.Array, theta: float) -> jax.Array:
    half = x_BLHC.shape[-1] // 2
    frequency_C = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BL1C = positions_BL[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None]
    cos, sin = jnp.cos(angle_BL1C), jnp.sin(angle_BL1C)
    # Halves change places in the activation's dtype: in float32 they would be arrays of their own, twice as large.
    swapped_BLHC = jnp.concatenate([x_BLHC[..., half:], x_BLHC[..., :half]], axis=-1)
    kept = x_BLHC.astype(jnp.float32) * jnp.concatenate([cos, cos], axis=-1)
    return (kept + swapped_BLHC.astype(jnp.float32) * jnp.concatenate([-sin, sin], axis=-1)).astype(x_BLHC.dtype)


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
