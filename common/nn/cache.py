"""The key-value cache of decoding.

Legend: B batch rows, I input slots, S cache slots, Q new tokens, N layers, G key-value heads, C head dim.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from common.data.batch import Prompt
from common.kernels.bias import BiasTable
from common.kernels.visibility import Visibility
from common.nn.attention import KeysValues
from common.nn.stack import PerLayer
from common.sharding.rules import constrain

Layers = KeysValues | PerLayer[KeysValues]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of all layers, with the segment and position of each slot."""

    layers: Layers
    """Keys and values of self-attention: [B, G, S, C] per layer if layers are unrolled, else [N, B, G, S, C]."""
    segments_BS: jax.Array
    """0 for padding, else 1; empty slots have 1 too, since the causal mask hides them until they are filled."""
    positions_BS: jax.Array
    length: jax.Array
    """Number of filled slots (scalar), and so the slot of the next token."""
    next_position_B: jax.Array
    """Position of each row's next token. Positions count on from the inputs to the decoder's tokens, as in training."""
    memory: Layers | None = None
    """Keys and values of cross-attention, [B, G, I, C] per layer: computed once, never changed. Rows made by
    `repeat_rows` share them."""
    memory_segments_BI: jax.Array | None = None
    memory_positions_BI: jax.Array | None = None

    @classmethod
    def after_inputs(cls, layers: Layers, prompt: Prompt, max_new_tokens: int) -> "Cache":
        """Makes the cache of a single sequence: inputs already read into `layers`, then `max_new_tokens` empty slots.

        `layers` already has the empty slots too.
        """
        room = ((0, 0), (0, max_new_tokens))
        return cls(
            layers=layers,
            segments_BS=jnp.pad(prompt.segments_BI(), room, constant_values=1),
            positions_BS=jnp.pad(prompt.positions_BI(), room),
            length=jnp.int32(prompt.inputs_BI.shape[1]),
            next_position_B=prompt.lengths_B,
        )

    @classmethod
    def with_memory(cls, memory: Layers, prompt: Prompt, max_new_tokens: int) -> "Cache":
        """Makes the cache of two sequences: the memory of the inputs, and empty slots for the decoder's tokens."""
        B = prompt.lengths_B.shape[0]

        def empty(x: jax.Array) -> jax.Array:
            axes = (*(None,) * (x.ndim - 4), "batch", "kv_heads", None, None)
            return constrain(jnp.zeros((*x.shape[:-2], max_new_tokens, x.shape[-1]), x.dtype), *axes)

        return cls(
            layers=jax.tree.map(empty, memory),
            segments_BS=jnp.ones((B, max_new_tokens), jnp.int32),
            positions_BS=jnp.zeros((B, max_new_tokens), jnp.int32),
            length=jnp.int32(0),
            next_position_B=prompt.lengths_B,
            memory=memory,
            memory_segments_BI=prompt.segments_BI(),
            memory_positions_BI=prompt.positions_BI(),
        )

    def extend(self, slots: int) -> "Cache":
        """Appends `slots` empty slots."""

        def pad(x: jax.Array, axis: int, value: int) -> jax.Array:
            return jnp.pad(x, [(0, slots if i == axis else 0) for i in range(x.ndim)], constant_values=value)

        return dataclasses.replace(
            self,
            layers=jax.tree.map(lambda x: pad(x, x.ndim - 2, 0), self.layers),
            segments_BS=pad(self.segments_BS, 1, 1),
            positions_BS=pad(self.positions_BS, 1, 0),
        )

    def repeat_rows(self, times: int) -> "Cache":
        """Repeats each row `times` times, consecutively. The memory is not repeated: those rows share it."""
        return self._map_rows(lambda x, axis: jnp.repeat(x, times, axis=axis))

    def take_rows(self, rows_B: jax.Array) -> "Cache":
        """Replaces row i by row `rows_B[i]`; both must be repetitions of one row, whose memory they share."""
        return self._map_rows(lambda x, axis: jnp.take(x, rows_B, axis=axis))

    def _map_rows(self, change: Callable[[jax.Array, int], jax.Array]) -> "Cache":
        return dataclasses.replace(
            self,
            layers=jax.tree.map(lambda x: change(x, x.ndim - 4), self.layers),
            segments_BS=change(self.segments_BS, 0),
            positions_BS=change(self.positions_BS, 0),
            next_position_B=change(self.next_position_B, 0),
        )

    def mask_padding(self, queries: int, lengths_B: jax.Array) -> "Cache":
        """Masks all but the first `lengths_B` of each row's last `queries` tokens: the others are padding."""
        begin = self.length - queries
        slots_1S = jnp.arange(self.segments_BS.shape[1], dtype=jnp.int32)[None]
        padding_BS = (slots_1S >= begin + lengths_B[:, None]) & (slots_1S < self.length)
        return dataclasses.replace(
            self,
            segments_BS=jnp.where(padding_BS, 0, self.segments_BS),
            next_position_B=self.next_position_B - queries + lengths_B,
        )

    def advance(self, queries: int, bias: BiasTable | None) -> tuple["Cache", Visibility]:
        """Reserves slots for the next `queries` tokens of each row; returns the cache and what those tokens may see."""
        positions_BQ = self.next_position_B[:, None] + jnp.arange(queries, dtype=jnp.int32)[None]
        positions_BS = jax.lax.dynamic_update_slice_in_dim(self.positions_BS, positions_BQ, self.length, axis=1)
        visibility = Visibility(
            q_segments_BQ=jnp.ones_like(positions_BQ),
            k_segments_BK=self.segments_BS,
            q_positions_BQ=positions_BQ,
            k_positions_BK=positions_BS,
            causal=True,
            q_start=self.length,
            bias=bias,
        )
        advanced = dataclasses.replace(
            self,
            positions_BS=positions_BS,
            length=self.length + queries,
            next_position_B=self.next_position_B + queries,
        )
        return advanced, visibility

    def memory_visibility(self, positions_BQ: jax.Array) -> Visibility:
        """Lets every query see all of the memory but its padding."""
        assert self.memory_segments_BI is not None and self.memory_positions_BI is not None
        return Visibility(
            q_segments_BQ=jnp.ones_like(positions_BQ),
            k_segments_BK=self.memory_segments_BI,
            q_positions_BQ=positions_BQ,
            k_positions_BK=self.memory_positions_BI,
            causal=False,
        )
