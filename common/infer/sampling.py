"""Which token comes next: filters of a distribution, and one draw a row, without sorting.

Everything is found by bisection, whose passes are plain sums over the vocabulary: many times cheaper than a sort of it.

Legend: B rows, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.infer.config import Sample


def sample(logits_BV: jax.Array, keys_B: jax.Array, method: Sample) -> jax.Array:
    """One int32 token a row, drawn with the row's own key: temperature, then top-k, then top-p."""
    return draw(sampling_weights(logits_BV, method), jax.vmap(lambda key: jax.random.uniform(key))(keys_B))


def sampling_weights(logits_BV: jax.Array, method: Sample) -> jax.Array:
    """Float32 weights proportional to the probabilities drawn from, 0 for what the filters leave out."""
    peak_B1 = logits_BV.max(axis=-1, keepdims=True)
    weights_BV = jnp.exp((logits_BV - peak_B1) / method.temperature)
    if method.top_k is not None and method.top_k < logits_BV.shape[1]:
        weights_BV = keep_top_k(weights_BV, method.top_k)
    if method.top_p < 1.0:
        weights_BV = keep_top_p(weights_BV, method.top_p)
    return weights_BV


def keep_top_k(weights_BV: jax.Array, k: int) -> jax.Array:
    """Zeroes all but the k largest of non-negative weights; among equals the lowest ids stay."""
    return _keep(weights_BV, jnp.ones_like(weights_BV), jnp.full((weights_BV.shape[0],), k, jnp.float32))


def keep_top_p(weights_BV: jax.Array, p: float) -> jax.Array:
    """Zeroes all but the smallest set of largest weights that holds at least the share `p` of their sum."""
    return _keep(weights_BV, weights_BV, p * weights_BV.sum(axis=-1))


def draw(weights_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Inverts the distribution function at `uniform_B` in [0, 1): int32 ids, never one of weight 0.

    >>> import jax.numpy as jnp
    >>> draw(jnp.array([[1.0, 0.0, 3.0]] * 3), jnp.array([0.0, 0.2499, 0.25])).tolist()
    [0, 0, 2]
    """
    ids_1V = jnp.arange(weights_BV.shape[1], dtype=jnp.int32)[None]

    def up_to(id_B: jax.Array) -> jax.Array:
        return jnp.where(ids_1V <= id_B[:, None], weights_BV, 0.0).sum(axis=-1)

    last_B = jnp.full((weights_BV.shape[0],), weights_BV.shape[1] - 1, jnp.int32)
    # All sums run over the whole row in the same order, so that they grow with the id and reach the total.
    target_B = uniform_B * up_to(last_B)
    return _first(lambda id_B: up_to(id_B) > target_B, last_B)


def _keep(weights_BV: jax.Array, measure_BV: jax.Array, enough_B: jax.Array) -> jax.Array:
    """Zeroes all but the fewest largest weights whose measures add up to `enough_B`."""

    def measure(kept_BV: jax.Array) -> jax.Array:
        return jnp.where(kept_BV, measure_BV, 0.0).sum(axis=-1)

    # Non-negative floats are ordered as their bits are. Counted from the largest down, `_first` finds the border.
    bits_BV = jax.lax.bitcast_convert_type(weights_BV, jnp.int32)
    top_B = bits_BV.max(axis=-1)
    border_B1 = (top_B - _first(lambda below_B: measure(bits_BV >= (top_B - below_B)[:, None]) >= enough_B, top_B))[
        :, None
    ]
    ids_1V = jnp.arange(weights_BV.shape[1], dtype=jnp.int32)[None]

    def up_to(id_B: jax.Array) -> jax.Array:
        return (bits_BV > border_B1) | ((bits_BV == border_B1) & (ids_1V <= id_B[:, None]))

    last_B = jnp.full_like(top_B, weights_BV.shape[1] - 1)
    return jnp.where(up_to(_first(lambda id_B: measure(up_to(id_B)) >= enough_B, last_B)), weights_BV, 0.0)


def _first(holds: Callable[[jax.Array], jax.Array], last_B: jax.Array) -> jax.Array:
    """The smallest x_B in [0, last_B] (int32) for which a monotone predicate holds; `last_B` where it never does."""

    def unfinished(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        low_B, high_B = bounds
        return (low_B < high_B).any()

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds
        middle_B = low_B + (high_B - low_B) // 2
        found_B = holds(middle_B)
        return jnp.where(found_B, low_B, jnp.minimum(middle_B + 1, high_B)), jnp.where(found_B, middle_B, high_B)

    return jax.lax.while_loop(unfinished, halve, (jnp.zeros_like(last_B), last_B))[0]
