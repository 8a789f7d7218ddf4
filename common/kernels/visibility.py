"""Which keys a query may see: what every attention implementation takes instead of a dense mask.

Legend: B batch rows, Q query length, K key length, H heads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from common.kernels.bias import BiasTable

MASKED = float(jnp.finfo(jnp.float32).min)
"""Replaces the logits of unseen keys. It is finite, so that a query that sees no key does not produce NaN."""

ATTENTION = "attention"
"""The checkpoint name of what the backward pass needs from the forward pass: output and log-sums."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
    """Describes which keys each query sees, and the distances between them, without a dense mask.

    A query sees a key if both have the same non-zero segment id and, where `causal`, the key's index is not after the
    query's, or both indices are below `prefix_length`. An *index* is a place in the row: query i has index
    `q_offset + i`, plus `q_start` if that is known only when the program runs (a cache's length, a device's shard). A
    *position* is a place in the text; RoPE and the relative bias use it.
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
    """Promises that positions count up by one with the index within each segment: key j and query i are
    `j - i - q_offset` apart. Positions are known only when the program runs, so this cannot be checked."""
    one_segment: bool = dataclasses.field(default=False, metadata={"static": True})
    """Promises likewise that each row is one segment, the same for queries and keys, at its start, then padding."""

    @property
    def static_index(self) -> bool:
        """Whether the index of every query is known when the program is traced."""
        return self.q_start is None

    def keys_end(self, q_end: int) -> int:
        """Returns the end of the keys that queries `0..q_end-1` may see, as far as tracing can tell."""
        keys = self.k_segments_BK.shape[1]
        if not (self.causal and self.static_index):
            return keys
        return min(keys, max(self.q_offset + q_end, self.prefix_length))

    def block(self, q_begin: int, q_end: int, k_end: int) -> "Visibility":
        """Returns the description of queries `q_begin..q_end-1` and keys `0..k_end-1`."""
        return dataclasses.replace(
            self,
            q_segments_BQ=self.q_segments_BQ[:, q_begin:q_end],
            k_segments_BK=self.k_segments_BK[:, :k_end],
            q_positions_BQ=self.q_positions_BQ[:, q_begin:q_end],
            k_positions_BK=self.k_positions_BK[:, :k_end],
            q_offset=self.q_offset + q_begin,
        )

    def fold_rows(self, rows: int) -> "Visibility":
        """Returns the same queries in fewer rows: consecutive rows, which share a row of keys, become one."""
        assert not self.causal and self.bias is None
        return dataclasses.replace(
            self,
            q_segments_BQ=self.q_segments_BQ.reshape(rows, -1),
            q_positions_BQ=self.q_positions_BQ.reshape(rows, -1),
        )

    def mask_BQK(self) -> jax.Array:
        """Returns the dense mask: True where a query sees a key."""
        same_segment = self.q_segments_BQ[:, :, None] == self.k_segments_BK[:, None, :]
        mask = same_segment & (self.k_segments_BK != 0)[:, None, :]
        if not self.causal:
            return mask
        q_index = self.q_offset + jnp.arange(self.q_segments_BQ.shape[1], dtype=jnp.int32)[:, None]
        if self.q_start is not None:
            q_index += self.q_start
        k_index = jnp.arange(self.k_segments_BK.shape[1], dtype=jnp.int32)[None, :]
        causal = k_index <= q_index
        if self.prefix_length:
            causal |= jnp.maximum(k_index, q_index) < self.prefix_length
        return mask & causal[None]
