"""Padded texts for two libraries: ids and masks for the other, a `Batch` for ours.

Legend: B rows, L slots of a text, I input slots, T target slots.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from common.data.batch import Batch

Side = Literal["left", "right"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Padded:
    """One text per row; padding holds random ids, so that a model that reads it gives other results."""

    tokens_BL: np.ndarray
    real_BL: np.ndarray
    """Bool: which slots are not padding."""

    @property
    def positions_BL(self) -> np.ndarray:
        """Counted from a text's first token; 0 in padding before it."""
        return np.maximum(np.cumsum(self.real_BL, axis=1) - 1, 0)


def padded(lengths: Sequence[int], width: int, side: Side, *, vocab_size: int, seed: int) -> Padded:
    """Random texts of the given lengths, padded on `side` to `width`."""
    slots = np.arange(width)[None]
    lengths_B1 = np.array(lengths)[:, None]
    real_BL = slots < lengths_B1 if side == "right" else slots >= width - lengths_B1
    tokens_BL = np.random.default_rng(seed).integers(0, vocab_size, (len(lengths), width))
    return Padded(tokens_BL=tokens_BL, real_BL=real_BL)


def one_text(text: Padded, input_slots: int) -> tuple[Batch, np.ndarray]:
    """A language model's batch, in which each token predicts the next and the first slots are inputs; and labels_BL.

    Labels follow Transformers' convention: slot l is predicted from slot l - 1, and -100 means no label.
    """
    tokens_BL, real_BL = text.tokens_BL, text.real_BL
    predicted_BL = real_BL.copy()
    predicted_BL[:, 1:] &= real_BL[:, :-1]
    predicted_BL[:, : input_slots + 1] = False
    weights_BL = np.roll(predicted_BL, -1, axis=1)
    cut = np.s_[:, :input_slots], np.s_[:, input_slots:]
    batch = _batch(
        inputs=(tokens_BL[cut[0]], real_BL[cut[0]], text.positions_BL[cut[0]]),
        decoder=(tokens_BL[cut[1]], real_BL[cut[1]], text.positions_BL[cut[1]]),
        targets_BT=np.roll(tokens_BL, -1, axis=1)[cut[1]],
        weights_BT=weights_BL[cut[1]],
    )
    return batch, np.where(predicted_BL, tokens_BL, -100)


def two_texts(inputs: Padded, decoder: Padded, targets_BT: np.ndarray) -> tuple[Batch, np.ndarray]:
    """An encoder-decoder's batch, and labels_BT, each predicted from the same slot; -100 means no label."""
    lengths_B1 = inputs.real_BL.sum(axis=1, keepdims=True)
    batch = _batch(
        inputs=(inputs.tokens_BL, inputs.real_BL, inputs.positions_BL),
        decoder=(decoder.tokens_BL, decoder.real_BL, decoder.positions_BL + lengths_B1),
        targets_BT=targets_BT,
        weights_BT=decoder.real_BL,
    )
    return batch, np.where(decoder.real_BL, targets_BT, -100)


Block = tuple[np.ndarray, np.ndarray, np.ndarray]


def _batch(*, inputs: Block, decoder: Block, targets_BT: np.ndarray, weights_BT: np.ndarray) -> Batch:
    inputs_BI, input_segments_BI, input_positions_BI = (jnp.asarray(x, jnp.int32) for x in inputs)
    decoder_inputs_BT, target_segments_BT, target_positions_BT = (jnp.asarray(x, jnp.int32) for x in decoder)
    return Batch(
        inputs_BI=inputs_BI,
        input_segments_BI=input_segments_BI,
        input_positions_BI=input_positions_BI,
        decoder_inputs_BT=decoder_inputs_BT,
        targets_BT=jnp.asarray(targets_BT, jnp.int32),
        target_segments_BT=target_segments_BT,
        target_positions_BT=target_positions_BT,
        weights_BT=jnp.asarray(weights_BT, jnp.float32),
    )
