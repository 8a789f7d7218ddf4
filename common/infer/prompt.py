"""What decoding starts from.

Legend: B batch rows, I input slots.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One example a row: inputs at the left, `lengths_B` of them real (0 is legal); int32."""

    inputs_BI: jax.Array
    lengths_B: jax.Array

    def positions_BI(self) -> jax.Array:
        B, I = self.inputs_BI.shape  # noqa: E741 (a shape letter)
        return jnp.broadcast_to(jnp.arange(I, dtype=jnp.int32)[None], (B, I))

    def segments_BI(self) -> jax.Array:
        return (self.positions_BI() < self.lengths_B[:, None]).astype(jnp.int32)
