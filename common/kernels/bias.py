"""T5's relative-position bias: its buckets, and a table that attention implementations expand as they need.

Legend: B batch rows (or 1), Q query length, K key length, H heads, R relative buckets.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


def relative_bucket(distance: jax.Array, *, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """Returns T5's bucket for `distance` = key position - query position (int32, any shape).

    arXiv 1910.10683, section 2.1: half of the buckets of each direction hold one distance each, the others grow
    logarithmically up to `max_distance`. With `bidirectional`, keys after the query use the upper half of the buckets.

    >>> import jax.numpy as jnp
    >>> relative_bucket(jnp.array([-200, -9, -1, 0, 1, 9]), bidirectional=True, buckets=32, max_distance=128).tolist()
    [15, 8, 1, 0, 17, 24]
    >>> relative_bucket(jnp.array([-200, -9, -1, 0, 1, 9]), bidirectional=False, buckets=32, max_distance=128).tolist()
    [31, 9, 1, 0, 0, 0]
    """
    offset = jnp.zeros_like(distance)
    back = -distance
    if bidirectional:
        buckets //= 2
        offset = jnp.where(back < 0, buckets, 0)
        back = jnp.abs(back)
    else:
        back = jnp.maximum(back, 0)
    exact = buckets // 2
    ratio = jnp.maximum(back, exact).astype(jnp.float32) / exact
    # The epsilon (float32's, as in T5's code) decides into which bucket distances at a border fall.
    steps = jnp.log(ratio + jnp.finfo(jnp.float32).eps) / math.log(max_distance / exact) * (buckets - exact)
    far = jnp.minimum(exact + steps.astype(jnp.int32), buckets - 1)
    return offset + jnp.where(back < exact, back, far)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasTable:
    """T5's relative bias as a table of buckets; an attention implementation expands what it needs of it."""

    table_HR: jax.Array
    bidirectional: bool = dataclasses.field(metadata={"static": True})
    max_distance: int = dataclasses.field(metadata={"static": True})

    def expand(self, q_positions_BQ: jax.Array, k_positions_BK: jax.Array) -> jax.Array:
        """Returns bias_BHQK (float32), to add to the attention logits."""
        bucket_BQK = relative_bucket(
            k_positions_BK[:, None, :] - q_positions_BQ[:, :, None],
            bidirectional=self.bidirectional,
            buckets=self.table_HR.shape[1],
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(self.table_HR[:, bucket_BQK], 0, 1)
