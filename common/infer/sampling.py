"""Draws the next token: temperature, top-k and top-p filters, and one draw per row.

Nothing is sorted. Thresholds are found by bisection; each pass is a plain sum over the vocabulary, which is many times
cheaper than a sort of it.

Legend: B batch rows, V vocab.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.infer.config import Sample


def sample(logits_BV: jax.Array, keys_B: jax.Array, method: Sample) -> jax.Array:
    """Draws one token per row, int32 [B], each with its row's key."""
    return draw(sampling_weights(logits_BV, method), jax.vmap(lambda key: jax.random.uniform(key))(keys_B))


def sampling_weights(logits_BV: jax.Array, method: Sample) -> jax.Array:
    """Returns float32 weights proportional to the sampling probabilities; tokens that a filter removes have 0.

    The temperature comes first, then top-k, then top-p.
    """
    peak_B1 = logits_BV.max(axis=-1, keepdims=True)
    weights_BV = jnp.exp((logits_BV - peak_B1) / method.temperature)
    if method.top_k is not None and method.top_k < logits_BV.shape[1]:
        weights_BV = keep_top_k(weights_BV, method.top_k)
    if method.top_p < 1.0:
        weights_BV = keep_top_p(weights_BV, method.top_p)
    return weights_BV


def keep_top_k(weights_BV: jax.Array, k: int) -> jax.Array:
    """Keeps the k largest non-negative weights and zeroes the rest; of equal weights, the lower ids are kept.

    >>> keep_top_k(jnp.array([[1.0, 4.0, 1.0, 1.0]]), 3).tolist()
    [[1.0, 4.0, 1.0, 0.0]]
    """
    return _keep_largest(weights_BV, jnp.ones_like(weights_BV), jnp.full((weights_BV.shape[0],), k, jnp.float32))


def keep_top_p(weights_BV: jax.Array, p: float) -> jax.Array:
    """Keeps the smallest set of largest weights whose share of the row's sum is at least `p`, and zeroes the rest.

    >>> keep_top_p(jnp.array([[1.0, 4.0, 1.0, 2.0]]), 0.75).tolist()
    [[0.0, 4.0, 0.0, 2.0]]
    """
    return _keep_largest(weights_BV, weights_BV, p * weights_BV.sum(axis=-1))


def draw(weights_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """Inverts the cumulative distribution at `uniform_B` in [0, 1): int32 ids [B], never one of weight 0.

    >>> draw(jnp.array([[1.0, 0.0, 3.0]] * 3), jnp.array([0.0, 0.2499, 0.25])).tolist()
    [0, 0, 2]
    """
    ids_1V = jnp.arange(weights_BV.shape[1], dtype=jnp.int32)[None]

    def sum_up_to(id_B: jax.Array) -> jax.Array:
        return jnp.where(ids_1V <= id_B[:, None], weights_BV, 0.0).sum(axis=-1)

    last_B = jnp.full((weights_BV.shape[0],), weights_BV.shape[1] - 1, jnp.int32)
    # Every sum runs over the whole row in the same order, so sums grow with the id and reach the total exactly.
    target_B = uniform_B * sum_up_to(last_B)
    return _smallest(lambda id_B: sum_up_to(id_B) > target_B, last_B)


def _keep_largest(weights_BV: jax.Array, measure_BV: jax.Array, needed_B: jax.Array) -> jax.Array:
    """Keeps as few of the largest weights as have measures that sum to at least `needed_B`, and zeroes the rest.

    The first step finds the border value, the smallest weight that is kept; the second finds the last id that is kept
    of those tied at the border. For three of the weights 1 4 1 1 (every measure is 1, 3 are needed):

        border value    4 alone has 1 < 3; with all the ones there are 4 >= 3: the border is 1
        last tied id    4 and the tied ids up to 0 have 2 < 3; up to 2 they have 3: ids 0, 1 and 2 are kept
    """
    # Non-negative floats are ordered as their bits are, so both steps bisect over integers.
    bits_BV = jax.lax.bitcast_convert_type(weights_BV, jnp.int32)
    ids_1V = jnp.arange(weights_BV.shape[1], dtype=jnp.int32)[None]

    def is_enough(kept_BV: jax.Array) -> jax.Array:
        return jnp.where(kept_BV, measure_BV, 0.0).sum(axis=-1) >= needed_B

    border_B1 = _border_bits(bits_BV, is_enough)[:, None]

    def kept_with_ties_up_to(id_B: jax.Array) -> jax.Array:
        return (bits_BV > border_B1) | ((bits_BV == border_B1) & (ids_1V <= id_B[:, None]))

    last_id_B = jnp.full((len(bits_BV),), bits_BV.shape[1] - 1, jnp.int32)
    last_tied_id_B = _smallest(lambda id_B: is_enough(kept_with_ties_up_to(id_B)), last_id_B)
    return jnp.where(kept_with_ties_up_to(last_tied_id_B), weights_BV, 0.0)


def _border_bits(bits_BV: jax.Array, is_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the border value's bits, int32 [B]: the largest for which the weights at or above it are enough."""
    top_B = bits_BV.max(axis=-1)
    below_top_B = _smallest(lambda below_B: is_enough(bits_BV >= (top_B - below_B)[:, None]), top_B)
    return top_B - below_top_B


def _smallest(holds: Callable[[jax.Array], jax.Array], last_B: jax.Array) -> jax.Array:
    """Bisects for the smallest x in [0, last], int32 [B], for which a monotone predicate holds; `last_B` if none."""

    def unfinished(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        low_B, high_B = bounds
        return (low_B < high_B).any()

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds  # equal in rows that are finished, and unchanged there
        middle_B = low_B + (high_B - low_B) // 2
        found_B = holds(middle_B)
        return jnp.where(found_B, low_B, jnp.minimum(middle_B + 1, high_B)), jnp.where(found_B, middle_B, high_B)

    return jax.lax.while_loop(unfinished, halve, (jnp.zeros_like(last_B), last_B))[0]
