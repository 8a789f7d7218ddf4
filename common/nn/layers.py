"""Norm, MLP, embedding, head and dropout.

Legend: B batch rows, L sequence, T target slots, D model, F mlp, V vocab.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.linear import linear
from common.nn.parameters import Initialisers, ones, param
from common.nn.recipe import Recipe
from common.sharding.rules import constrain


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, then the scale in the activation dtype (T5X; arXiv 1910.07467)."""

    def __init__(self, d_model: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale_D = param(rngs, ones, (d_model,), ("embed",))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x32_BLD = x_BLD.astype(jnp.float32)
        mean_square_BL1 = jnp.mean(jnp.square(x32_BLD), axis=-1, keepdims=True)
        normed_BLD = (x32_BLD * jax.lax.rsqrt(mean_square_BL1 + self.epsilon)).astype(x_BLD.dtype)
        return normed_BLD * self.scale_D[None, None].astype(x_BLD.dtype)


class MLP(nnx.Module):
    """Plain (ReLU, GELU) or gated (GEGLU, SwiGLU) feed-forward layer without biases."""

    def __init__(self, d_model: int, d_ff: int, recipe: Recipe, init: Initialisers, *, rngs: nnx.Rngs):
        self.kind, self.dropout_rate = recipe.mlp, recipe.dropout
        self.in_DF = param(rngs, init.mlp_in(d_model), (d_model, d_ff), ("embed", "mlp"))
        if recipe.gated_mlp:
            self.linear_DF = param(rngs, init.mlp_in(d_model), (d_model, d_ff), ("embed", "mlp"))
        self.out_FD = param(rngs, init.mlp_out(d_ff), (d_ff, d_model), ("mlp", "embed"))

    def __call__(self, x_BLD: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        h_BLF = linear(x_BLD, self.in_DF[...])
        match self.kind:
            case "relu":
                h_BLF = jax.nn.relu(h_BLF)
            case "gelu":
                h_BLF = jax.nn.gelu(h_BLF, approximate=True)
            case "geglu":
                h_BLF = jax.nn.gelu(h_BLF, approximate=True) * linear(x_BLD, self.linear_DF[...])
            case "swiglu":
                h_BLF = jax.nn.silu(h_BLF) * linear(x_BLD, self.linear_DF[...])
        h_BLF = constrain(h_BLF, "batch", None, "mlp")
        h_BLF = dropout(h_BLF, self.dropout_rate, dropout_key)
        return linear(h_BLF, self.out_FD[...])


class Embedding(nnx.Module):
    """The token table, read by gather."""

    def __init__(self, vocab_size: int, d_model: int, init: Initialisers, *, rngs: nnx.Rngs):
        self.table_VD = param(rngs, init.embedding(d_model), (vocab_size, d_model), ("vocab", "embed"))

    def __call__(self, tokens_BL: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return constrain(self.table_VD[...].astype(dtype)[tokens_BL], "batch", None, None)


class Head(nnx.Module):
    """The output projection: its own matrix, or the embedding's (T5 then divides by sqrt(d_model))."""

    def __init__(self, vocab_size: int, d_model: int, recipe: Recipe, init: Initialisers, *, rngs: nnx.Rngs):
        self.scale = d_model**-0.5 if recipe.tied_embeddings and recipe.init == "t5" else 1.0
        shape = (d_model, vocab_size)
        self.weight_DV = None if recipe.tied_embeddings else param(rngs, init.head(d_model), shape, ("embed", "vocab"))

    def weights(self, embedding: Embedding) -> jax.Array:
        """w_DV, float32: logits are `hidden @ w_DV`."""
        if self.weight_DV is None:
            return embedding.table_VD[...].T * self.scale
        return self.weight_DV[...]


def dropout(x_BLD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout whose mask is shared along the length axis (T5X). Without a key, or at rate 0, `x` itself."""
    if key is None or rate == 0.0:
        return x_BLD
    shape = (*x_BLD.shape[:-2], 1, x_BLD.shape[-1])
    kept = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(kept, x_BLD / (1.0 - rate), 0).astype(x_BLD.dtype)


def dropout_keys(key: jax.Array | None, sites: int) -> tuple[jax.Array | None, ...]:
    """One key a dropout site; all None without a key, which turns dropout off."""
    return (None,) * sites if key is None else tuple(jax.random.split(key, sites))
