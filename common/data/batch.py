"""The layouts that every family reads: a training batch (block order), and a prompt to continue.

Legend: B rows, I input slots, T target slots, W slots of decoder inputs.

A batch row holds several packed examples in two blocks, `[inputs of all its examples | shifted targets of all its
examples]`. Segment ids (1, 2, ... per row; 0 is padding), positions and loss weights are explicit: nothing is ever
derived from token values, so token id 0 may stand inside a text and inputs or targets may be empty. An example's target
positions continue from its input positions, and its targets are shifted right after a start token, so every family
predicts `targets[j]` from `(inputs, targets[<j])`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from common.compute.length_sums import LengthSums

Array = Any
"""A NumPy array on the host, a `jax.Array` in a program."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's rows; integer arrays are int32, weights float32."""

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
    """A batch on the host with what the ledgers need of it."""

    batch: Batch
    fingerprint: int
    """Sum over rows, modulo 2**128, of each row's seeded hash: commutative, so hosts may add their shares."""
    examples: int
    length_sums: LengthSums
    """Of the real (unpadded) examples in the batch."""
    loss_tokens: int
    """Target tokens with non-zero weight."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Where decoding begins: one example a row, inputs at the left, `lengths_B` of them real (0 is legal); int32."""

    inputs_BI: jax.Array
    lengths_B: jax.Array
    starts_B: jax.Array
    """Each row's next decoder input: the start token, or, for a language model whose inputs and targets are one text,
    the prompt's last token (its inputs are then the prompt without it)."""
    written_BW: jax.Array | None = None
    """Decoder inputs before that one, at the left; None where no row has any."""
    written_lengths_B: jax.Array | None = None

    def positions_BI(self) -> jax.Array:
        B, I = self.inputs_BI.shape  # noqa: E741 (a shape letter)
        return jnp.broadcast_to(jnp.arange(I, dtype=jnp.int32)[None], (B, I))

    def segments_BI(self) -> jax.Array:
        return (self.positions_BI() < self.lengths_B[:, None]).astype(jnp.int32)
