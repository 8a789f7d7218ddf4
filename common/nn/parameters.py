"""Parameters with logical axes, and their initialisers."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.nn.linear import Columns
from common.nn.parametrization import Scaling
from common.recipe import Recipe
from common.sharding.rules import all_gather_parameter

Initialiser = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def param(rngs: nnx.Rngs, init: Initialiser, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """Makes a float32 parameter with logical axis names, which `common.sharding.rules` maps to shardings."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(init(rngs.params(), shape), out_sharding=axes, eager_sharding=False)


def use(parameter: nnx.Param, dtype: Any) -> Any:
    """Returns a parameter for computation: cast to `dtype`, then all-gathered from its shards."""
    stored = parameter[...]
    if isinstance(stored, Columns):
        return stored
    axes = parameter.get_metadata("out_sharding")[-stored.ndim :]  # a single layer has no "layers" axis
    return all_gather_parameter(stored.astype(dtype), axes)


def use_bias(parameter: nnx.Param | None, dtype: Any) -> jax.Array | None:
    """As `use`, for an optional bias."""
    return None if parameter is None else use(parameter, dtype)


def normal(std: float) -> Initialiser:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def truncated_normal(std: float) -> Initialiser:
    """Draws from a normal truncated at two of its standard deviations; the result has standard deviation `std`."""
    return lambda key, shape: std / 0.87962566103423978 * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)


def uniform(limit: float) -> Initialiser:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


class Initialisers:
    """The initialiser of each kind of weight in a stack.

    `t5` uses T5X's standard deviations: query (d_model * head_dim)^-1/2, key and value d_model^-1/2, attention output
    (heads * head_dim)^-1/2, MLP d_model^-1/2 in and d_ff^-1/2 out (truncated), head d_model^-1/2 (truncated), embedding
    1, relative bias uniform with variance 1/fan_avg. `fan_in` uses fan_in^-1/2 throughout, divided by sqrt(residual
    branches) for residual outputs (GPT-2); embedding and head are so small that a fresh model's predictions are nearly
    uniform. Biases are initialised to zero.

    Other sizes than the fan-in of a layer's matrices are those of the base model (`common.nn.parametrization`).
    """

    def __init__(self, recipe: Recipe, scaling: Scaling, branches: int):
        """`branches`: residual branches of a layer."""
        self.scaling = scaling
        self.t5 = recipe.init == "t5"
        self.tied = recipe.tied_embeddings
        self.residual = 1.0 if self.t5 else (branches * scaling.base_layers) ** -0.5

    def query(self, d_model: int) -> Initialiser:
        return normal((d_model * self.scaling.base_head_dim) ** -0.5 if self.t5 else d_model**-0.5)

    def key_value(self, d_model: int) -> Initialiser:
        return normal(d_model**-0.5)

    def attention_out(self, fan_in: int) -> Initialiser:
        return normal(fan_in**-0.5 * self.residual)

    def mlp_in(self, d_model: int) -> Initialiser:
        return truncated_normal(d_model**-0.5)

    def mlp_out(self, d_ff: int) -> Initialiser:
        return truncated_normal(d_ff**-0.5 * self.residual)

    def embedding(self) -> Initialiser:
        if self.t5:
            return normal(1.0)
        # A tied table is also the head, so it must keep a fresh model's logits small.
        return normal(1.0 / self.scaling.base_width if self.tied else self.scaling.base_width**-0.5)

    def positions(self) -> Initialiser:
        # The embedding's scale, so that neither dominates their sum.
        return self.embedding()

    def head(self) -> Initialiser:
        base_width = self.scaling.base_width
        return truncated_normal(base_width**-0.5) if self.t5 else normal(1.0 / base_width)

    def relative_bias(self, num_heads: int, buckets: int) -> Initialiser:
        return uniform(math.sqrt(3.0 / ((self.scaling.base_heads(num_heads) + buckets) / 2)))
