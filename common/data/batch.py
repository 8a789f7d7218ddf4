"""The layouts that every family reads: a training batch (block order), and a prompt to continue.

A batch row holds several packed examples in two blocks, [all their inputs | all their shifted targets].
Segment ids (1, 2, ... in each row; 0 is padding), positions and loss weights are explicit. Nothing is derived from
token values, so token id 0 may occur in a text, and inputs or targets may be empty. An example's target positions
continue from its input positions. Decoder inputs are its targets shifted right after a start token, so that every
family predicts `targets[j]` from `(inputs, targets[<j])`. `common.data.block_layout` shows a worked example.

Legend: B rows, I input slots, T target slots, W slots of decoder inputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from common.compute.length_sums import LengthSums

Array = Any
"""A NumPy array on the host, a `jax.Array` on devices."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """The rows of one step. Integer arrays are int32, weights float32."""

    inputs_BI: Array
    input_segments_BI: Array
    input_positions_BI: Array
    decoder_inputs_BT: Array
    targets_BT: Array
    target_segments_BT: Array
    target_positions_BT: Array
    weights_BT: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostBatch:
    """A batch on the host, with the counts that the ledgers need."""

    batch: Batch
    fingerprint: int
    """The sum, modulo 2**128, of the rows' seeded hashes. Sums commute, so hosts add those of their own rows."""
    source_fingerprint: int
    """As `fingerprint`, over the source's records alone (`Examples.origins`), in their order within each row: equal for
    any objective, template and row length that reads the same records into the same rows."""
    examples: int
    length_sums: LengthSums
    """Sums over the examples in the batch, without padding."""
    loss_tokens: int
    """Target tokens with non-zero weight."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Where decoding begins, int32. A row has one example: inputs at the left, `lengths_B` of them real (maybe 0)."""

    inputs_BI: jax.Array
    lengths_B: jax.Array
    starts_B: jax.Array
    """The next decoder input of each row: the start token, or the last token of the prompt for a language model whose
    inputs and targets are one text (its inputs are then the prompt without that token)."""
    written_BW: jax.Array | None = None
    """The decoder inputs before it, at the left; None if no row has any."""
    written_lengths_B: jax.Array | None = None
    """How many of them are real."""

    def positions_BI(self) -> jax.Array:
        """The position of each input slot."""
        B, I = self.inputs_BI.shape  # noqa: E741 (a shape letter)
        return jnp.broadcast_to(jnp.arange(I, dtype=jnp.int32)[None], (B, I))

    def segments_BI(self) -> jax.Array:
        """Segment ids: 1 for inputs, 0 for padding."""
        return (self.positions_BI() < self.lengths_B[:, None]).astype(jnp.int32)
