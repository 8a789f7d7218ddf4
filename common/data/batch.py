"""The batch layout that both families read (block order).

Legend: B rows, I input slots, T target slots.

A row holds several packed examples in two blocks, `[inputs of all its examples | shifted targets of all its examples]`.
Segment ids (1, 2, ... per row; 0 is padding), positions and loss weights are explicit: nothing is ever derived from
token values, so token id 0 may stand inside a text and inputs or targets may be empty. An example's target positions
continue from its input positions, and its targets are shifted right behind a start token, so that every family predicts
`targets[j]` from `(inputs, targets[<j])`.
"""

import dataclasses
from typing import Any

import jax

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
