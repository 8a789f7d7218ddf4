"""Norms, MLP, embedding, output head and dropout.

Legend: B batch rows, L sequence, D model, F mlp, V vocab, P shards of a row, S positions of a shard (padded), N chunks,
U positions of a shard in one chunk, E features out.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.linear import linear
from common.nn.parameters import Initialisers, ones, param, use, use_bias, zeros
from common.recipe import Execution, Recipe, Widths
from common.sharding.rules import all_gather_residual, constrain, num_shards, reduce_scatter_residual


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, then the scale in the activation dtype (T5X; arXiv 1910.07467)."""

    def __init__(self, d_model: int, epsilon: float, *, rngs: nnx.Rngs, axis: str = "embed"):
        self.epsilon = epsilon
        self.scale_D = param(rngs, ones, (d_model,), (axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis of an array of any rank."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = (x32 * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        return normed * _broadcast(use(self.scale_D, x.dtype), x)


class LayerNorm(nnx.Module):
    """Mean and variance norm in float32, then scale and bias in the activation dtype (arXiv 1607.06450)."""

    def __init__(self, d_model: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale_D = param(rngs, ones, (d_model,), ("embed",))
        self.bias_D = param(rngs, zeros, (d_model,), ("embed",))

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        x32_BLD = x_BLD.astype(jnp.float32)
        centred_BLD = x32_BLD - jnp.mean(x32_BLD, axis=-1, keepdims=True)
        variance_BL1 = jnp.mean(jnp.square(centred_BLD), axis=-1, keepdims=True)
        normed_BLD = (centred_BLD * jax.lax.rsqrt(variance_BL1 + self.epsilon)).astype(x_BLD.dtype)
        scale_D, bias_D = (use(parameter, x_BLD.dtype) for parameter in (self.scale_D, self.bias_D))
        return normed_BLD * _broadcast(scale_D, x_BLD) + _broadcast(bias_D, x_BLD)


def make_norm(d_model: int, recipe: Recipe, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    """Makes the recipe's norm for the residual stream."""
    kind = LayerNorm if recipe.norm == "layernorm" else RMSNorm
    return kind(d_model, recipe.norm_epsilon, rngs=rngs)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,  # its tanh approximation
    "geglu": jax.nn.gelu,
    "swiglu": jax.nn.silu,
}


class MLP(nnx.Module):
    """Feed-forward layer: plain (ReLU, GELU) or gated (GEGLU, SwiGLU)."""

    def __init__(self, widths: Widths, execution: Execution, init: Initialisers, *, rngs: nnx.Rngs):
        recipe, d_model, d_ff = widths.recipe, widths.d_model, widths.d_ff
        self.activation, self.gated = ACTIVATIONS[recipe.mlp], recipe.gated_mlp
        self.dropout_rate, self.chunk = recipe.dropout, execution.mlp_chunk
        self.in_DF = param(rngs, init.mlp_in(d_model), (d_model, d_ff), ("embed", "mlp"))
        self.in_bias_F = bias(rngs, recipe, (d_ff,), ("mlp",))
        if recipe.gated_mlp:
            self.linear_DF = param(rngs, init.mlp_in(d_model), (d_model, d_ff), ("embed", "mlp"))
            self.linear_bias_F = bias(rngs, recipe, (d_ff,), ("mlp",))
        self.out_FD = param(rngs, init.mlp_out(d_ff), (d_ff, d_model), ("mlp", "embed"))
        self.out_bias_D = bias(rngs, recipe, (d_model,), ("embed",))

    def __call__(self, x_BLD: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        dtype = x_BLD.dtype
        # Gathered once for all chunks.
        in_weights = use(self.in_DF, dtype), use_bias(self.in_bias_F, dtype)
        linear_weights = (use(self.linear_DF, dtype), use_bias(self.linear_bias_F, dtype)) if self.gated else None
        out_weights = use(self.out_FD, dtype), use_bias(self.out_bias_D, dtype)

        def network(x_BUD: jax.Array) -> jax.Array:
            h_BUF = linear(x_BUD, *in_weights)
            if linear_weights is None:
                h_BUF = self.activation(h_BUF)
            else:
                h_BUF = _gated(self.activation, h_BUF, linear(x_BUD, *linear_weights))
            h_BUF = constrain(h_BUF, "batch", "length", "mlp")
            return linear(dropout(h_BUF, self.dropout_rate, dropout_key), *out_weights)

        return reduce_scatter_residual(map_in_chunks(network, all_gather_residual(x_BLD), self.chunk))


def map_in_chunks(function: Callable[[jax.Array], jax.Array], x_BLD: jax.Array, chunk: int | None) -> jax.Array:
    """Applies a position-wise `function` to at most `chunk` positions of each row at a time, forward and backward.

    The backward pass recomputes chunk after chunk, so only the inputs are kept. `function` maps [B, n, D] to [B, n, E]
    for any n. With several shards along the length, a chunk contains positions of every shard, so chunks are sharded as
    the row is: of each shard, chunk i contains positions i, i + N, i + 2N, ... Zeros at the end of each shard make all
    chunks equally long.
    """
    B, L, D = x_BLD.shape
    P = num_shards("length") if L % num_shards("length") == 0 else 1
    length = L // P
    N = 1 if chunk is None else _num_chunks(length, max(1, chunk // P))
    if N == 1:
        return function(x_BLD)
    padding = -length % N
    x_BPSD = jnp.pad(x_BLD.reshape(B, P, length, D), ((0, 0), (0, 0), (0, padding), (0, 0)))
    x_NBPUD = jnp.moveaxis(x_BPSD.reshape(B, P, -1, N, D), 3, 0)
    y_NBxE = jax.lax.map(jax.checkpoint(function, prevent_cse=False), x_NBPUD.reshape(N, B, -1, D))  # x: P * U
    y_BPUNE = jnp.moveaxis(y_NBxE.reshape(*x_NBPUD.shape[:-1], -1), 0, 3)
    return y_BPUNE.reshape(B, P, length + padding, -1)[:, :, :length].reshape(B, L, -1)


def _num_chunks(length: int, chunk: int) -> int:
    """Returns the number of chunks of at most `chunk` positions: the fewest, or up to twice as many if that pads less.

    >>> [_num_chunks(length, 256) for length in (0, 256, 512, 626, 521)]
    [1, 1, 2, 3, 3]
    """
    least = max(1, -(-length // chunk))
    return min(range(least, 2 * least), key=lambda n: -length % n)


@partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _gated(activation: Callable[[jax.Array], jax.Array], gate_BLF: jax.Array, h_BLF: jax.Array) -> jax.Array:
    """Returns `activation(gate) * h`; the backward pass keeps only the two operands."""
    return activation(gate_BLF) * h_BLF


class Embedding(nnx.Module):
    """The token table; a lookup is a gather."""

    def __init__(self, vocab_size: int, d_model: int, recipe: Recipe, init: Initialisers, *, rngs: nnx.Rngs):
        self.scale = init.scaling.base_width**0.5 if recipe.scale_embeddings else 1.0
        self.table_VD = param(rngs, init.embedding(), (vocab_size, d_model), ("vocab", "embed"))

    def __call__(self, tokens_BL: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return constrain(use(self.table_VD, dtype)[tokens_BL] * self.scale, "batch", "residual", None)


class Head(nnx.Module):
    """The output projection: a matrix of its own, or the embedding's if the recipe ties them."""

    def __init__(self, vocab_size: int, d_model: int, recipe: Recipe, init: Initialisers, *, rngs: nnx.Rngs):
        self.scale = (init.scaling.base_width**-0.5 if recipe.scale_logits else 1.0) / init.scaling.width
        shape = (d_model, vocab_size)
        self.weight_DV = None if recipe.tied_embeddings else param(rngs, init.head(), shape, ("embed", "vocab"))

    def __call__(self, h_BLD: jax.Array) -> jax.Array:
        """Scales hidden states for the product with the weights."""
        return h_BLD * self.scale

    def weights(self, embedding: Embedding) -> jax.Array:
        """Returns w_DV in float32: logits are `hidden @ w_DV`."""
        return embedding.table_VD[...].T if self.weight_DV is None else self.weight_DV[...]


def bias(rngs: nnx.Rngs, recipe: Recipe, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param | None:
    """Makes a projection's bias; None if the recipe has no biases."""
    return param(rngs, zeros, shape, axes) if recipe.biases else None


def _broadcast(vector_D: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes a vector to the rank of `x`."""
    return vector_D.reshape((1,) * (x.ndim - 1) + vector_D.shape)


def dropout(x_BLD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Applies inverted dropout with one mask for all positions (T5X). Returns `x` itself without a key or at rate 0."""
    if key is None or rate == 0.0:
        return x_BLD
    shape = (*x_BLD.shape[:-2], 1, x_BLD.shape[-1])
    kept = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(kept, x_BLD / (1.0 - rate), 0).astype(x_BLD.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddBranch:
    """Adds a branch's output to the residual stream, after dropout and the parametrization's multiplier."""

    dropout_rate: float
    scale: float

    @classmethod
    def of(cls, recipe: Recipe, init: Initialisers) -> "AddBranch":
        return cls(dropout_rate=recipe.dropout, scale=1.0 / init.scaling.depth)

    def __call__(self, x_BLD: jax.Array, y_BLD: jax.Array, key: jax.Array | None) -> jax.Array:
        y_BLD = dropout(y_BLD, self.dropout_rate, key)
        return x_BLD + (y_BLD if self.scale == 1.0 else y_BLD * self.scale)


def dropout_keys(key: jax.Array | None, sites: int) -> tuple[jax.Array | None, ...]:
    """Splits a key into one per dropout site; without a key, all are None, and dropout is off."""
    return (None,) * sites if key is None else tuple(jax.random.split(key, sites))
