"""Which keys a query may see: what every attention implementation takes in place of a dense mask.

Legend: B batch rows, Q query length, K key length, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from common.kernels.bias import BiasTable

MASKED = float(jnp.finfo(jnp.float32).min)
"""Replaces the logits of keys that are not seen; finite, so that a row without keys has no NaN on its way to zero."""

ATTENTION = "attention"
"""Name under which rematerialisation finds what the backward pass needs of the forward pass: output and log-sums."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
    """Which keys a query may see, and at what distance they stand; never a dense mask, so that kernels can choose.

    A query sees a key when both have the same non-zero segment id and, where `causal`, the key's index is not after the
    query's, or is below `prefix_length` together with the query's. Index means place in the sequence: query i stands at
    key `q_offset + i`, and where a cache decides, `q_start` further. Position means place in the text, and is what RoPE
    and relative bias use.
    """

    q_segments_BQ: jax.Array
    k_segments_BK: jax.Array
    q_positions_BQ: jax.Array
    k_positions_BK: jax.Array
    causal: bool = dataclasses.field(metadata={"static": True})
    prefix_length: int = dataclasses.field(default=0, metadata={"static": True})
    q_offset: int = dataclasses.field(default=0, metadata={"static": True})
    q_start: jax.Array | None = None
    bias: BiasTable | None = None
    consecutive: bool = dataclasses.field(default=False, metadata={"static": True})
    """Within a segment positions count up by one with the index: key j and query i stand `j - i - q_offset` apart.
    Positions are known only when the program runs, so whoever makes the description vouches for it."""
    at_left: bool = dataclasses.field(default=False, metadata={"static": True})
    """Queries and keys of a row are each one segment, the same, at the row's begin; behind it is padding. Vouched for
    likewise."""

    @property
    def placed(self) -> bool:
        """Whether the index of every query is known before anything runs."""
        return self.q_start is None

    def last_key(self, q_end: int) -> int:
        """Keys from this index on are seen by no query before `q_end`, as far as is known beforehand."""
        keys = self.k_segments_BK.shape[1]
        if not (self.causal and self.placed):
            return keys
        return min(keys, max(self.q_offset + q_end, self.prefix_length))

    def block(self, q_begin: int, q_end: int, k_end: int) -> "Visibility":
        """The description of queries `q_begin..q_end-1` and keys `0..k_end-1` alone."""
        return dataclasses.replace(
            self,
            q_segments_BQ=self.q_segments_BQ[:, q_begin:q_end],
            k_segments_BK=self.k_segments_BK[:, :k_end],
            q_positions_BQ=self.q_positions_BQ[:, q_begin:q_end],
            k_positions_BK=self.k_positions_BK[:, :k_end],
            q_offset=self.q_offset + q_begin,
        )

    def gathered(self, rows: int) -> "Visibility":
        """The description of the same queries, in so many rows: consecutive rows of queries see one row of keys."""
        assert not self.causal and self.bias is None
        return dataclasses.replace(
            self,
            q_segments_BQ=self.q_segments_BQ.reshape(rows, -1),
            q_positions_BQ=self.q_positions_BQ.reshape(rows, -1),
        )

    def mask_BQK(self) -> jax.Array:
        same = self.q_segments_BQ[:, :, None] == self.k_segments_BK[:, None, :]
        mask = same & (self.k_segments_BK != 0)[:, None, :]
        if not self.causal:
            return mask
        q_index = self.q_offset + jnp.arange(self.q_segments_BQ.shape[1], dtype=jnp.int32)[:, None]
        if self.q_start is not None:
            q_index += self.q_start
        k_index = jnp.arange(self.k_segments_BK.shape[1], dtype=jnp.int32)[None, :]
        seen = k_index <= q_index
        if self.prefix_length:
            seen |= jnp.maximum(k_index, q_index) < self.prefix_length
        return mask & seen[None]
