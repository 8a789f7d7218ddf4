"""Pretraining objectives: how a record's tokens become inputs, targets and loss weights. No model is known here.

An objective is a pure function of (seed, index, tokens), so any example can be made again by anyone at any time.
Inputs and targets may be empty, and id 0 may stand anywhere: lengths are explicit. Objectives over raw text take pieces
of it (`cut_pieces`); what they do is in `common.data.denoising`, and both their sides end with eos, as T5's do.

Legend: I an example's input tokens, T its target tokens (both without padding), E examples, L tokens of a piece.
"""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from common.data import denoising
from common.data.objective_config import (
    BertStyle,
    CausalLM,
    Deshuffling,
    IidDenoising,
    PrefixLM,
    RawText,
    Single,
    SpanCorruption,
    Supervised,
)
from common.data.ragged import Ragged
from common.data.spans import SHORTEST_PIECE, count_noise

PIECES_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One example before packing."""

    inputs_I: np.ndarray
    """int32."""
    targets_T: np.ndarray
    """int32, not shifted."""
    weights_T: np.ndarray
    """float32; the loss is a mean over tokens by these weights."""


class SpecialIds(Protocol):
    """What examples and batches need of a tokenizer."""

    eos_id: int
    pad_id: int
    start_id: int
    content_hash: str
    vocab_size: int
    sentinels: int

    def sentinel_id(self, k: int) -> int: ...


def fields(objective: Single) -> tuple[str, ...]:
    """The fields of a record that the objective reads.

    >>> fields(CausalLM())
    ('text',)
    """
    return ("inputs", "targets") if isinstance(objective, Supervised) else ("text",)


def cut_pieces(texts: Ragged, length: int) -> Ragged:
    """All texts end to end, cut into pieces of `length` tokens; the last may be shorter, one of a single token is left.

    Nothing marks where a text ends, as nothing does in T5's pretraining data.

    >>> [piece.tolist() for piece in map(cut_pieces(Ragged.of([[1, 2, 3], [4], [5, 6]]), 4).__getitem__, range(2))]
    [[1, 2, 3, 4], [5, 6]]
    """
    first, last = int(texts.offsets[0]), int(texts.offsets[-1])
    offsets = np.arange(first, last + 1, length)
    if last - offsets[-1] >= SHORTEST_PIECE:
        offsets = np.append(offsets, last)
    return Ragged(tokens_P=texts.tokens_P, offsets=offsets)


def make_example(
    objective: Single, *, seed: int, index: int, tokens: Mapping[str, np.ndarray], ids: SpecialIds
) -> Example:
    """The example that `objective` makes of record `index`, whose fields hold int32 `tokens`.

    >>> import types
    >>> ids = types.SimpleNamespace(eos_id=1)
    >>> record = {"inputs": np.array([7, 0], np.int32), "targets": np.array([], np.int32)}
    >>> example = make_example(Supervised(), seed=0, index=0, tokens=record, ids=ids)
    >>> example.inputs_I.tolist(), example.targets_T.tolist(), example.weights_T.tolist()
    ([7, 0, 1], [1], [1.0])
    """
    match objective:
        case Supervised():
            inputs_I = _ended(tokens["inputs"], ids.eos_id, objective.eos_after_inputs)
            targets_T = _ended(tokens["targets"], ids.eos_id, objective.eos_after_targets)
        case CausalLM():
            inputs_I = np.zeros(0, np.int32)
            targets_T = _ended(tokens["text"], ids.eos_id, objective.eos)
        case _:
            made = denoise(objective, np.asarray(tokens["text"])[None], seed, np.array([index]), ids)
            inputs_I, targets_T = (_ended(side[0], ids.eos_id, True) for side in made)
    return Example(inputs_I=inputs_I, targets_T=targets_T, weights_T=np.ones(len(targets_T), np.float32))


def denoise(
    objective: RawText, tokens_EL: np.ndarray, seed: int, index_E: np.ndarray, ids: SpecialIds
) -> denoising.Pairs:
    """(inputs, targets) of pieces of one length, without eos."""
    match objective:
        case SpanCorruption(density=density, mean_span=mean_span):
            spans = count_noise(tokens_EL.shape[1], density, mean_span).spans
            return denoising.span_corruption(
                tokens_EL, seed, index_E, density=density, mean_span=mean_span, sentinels_S=_sentinels(ids, spans)
            )
        case IidDenoising(density=density):
            sentinels_S = _sentinels(ids, ids.sentinels)
            return denoising.iid_denoising(tokens_EL, seed, index_E, density=density, sentinels_S=sentinels_S)
        case BertStyle(density=density, random_share=random_share):
            return denoising.bert_style(
                tokens_EL,
                seed,
                index_E,
                density=density,
                random_share=random_share,
                mask_id=ids.sentinel_id(0),
                vocab_size=ids.vocab_size - ids.sentinels,
            )
        case Deshuffling():
            return denoising.deshuffling(tokens_EL, seed, index_E)
        case PrefixLM():
            return denoising.prefix_lm(tokens_EL, seed, index_E, complementary=False)


def example_lengths(
    objective: Single, token_lengths: Mapping[str, np.ndarray], *, seed: int, ids: SpecialIds
) -> tuple[np.ndarray, np.ndarray]:
    """Input and target lengths int64 [E] of all examples, from the token lengths of their fields.

    >>> example_lengths(CausalLM(), {"text": np.array([0, 4])}, seed=0, ids=None)
    (array([0, 0]), array([1, 5]))
    """
    match objective:
        case Supervised():
            inputs_E = np.asarray(token_lengths["inputs"], np.int64) + objective.eos_after_inputs
            targets_E = np.asarray(token_lengths["targets"], np.int64) + objective.eos_after_targets
        case CausalLM():
            targets_E = np.asarray(token_lengths["text"], np.int64) + objective.eos
            inputs_E = np.zeros_like(targets_E)
        case _:
            return _denoised_lengths(objective, np.asarray(token_lengths["text"]), seed, ids)
    return inputs_E, targets_E


def _denoised_lengths(
    objective: RawText, lengths_E: np.ndarray, seed: int, ids: SpecialIds
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths depend on draws, not on tokens: blank pieces have the same."""
    inputs_E, targets_E = np.zeros(len(lengths_E), np.int64), np.zeros(len(lengths_E), np.int64)
    for length in np.unique(lengths_E).tolist():
        (members,) = np.nonzero(lengths_E == length)
        for first in range(0, len(members), PIECES_AT_ONCE):
            index = members[first : first + PIECES_AT_ONCE]
            made = denoise(objective, np.zeros((len(index), length), np.int32), seed, index, ids)
            inputs_E[index], targets_E[index] = (side.lengths + 1 for side in made)
    return inputs_E, targets_E


def _sentinels(ids: SpecialIds, count: int) -> np.ndarray:
    return np.array([ids.sentinel_id(k) for k in range(count)], np.int32)


def _ended(tokens: np.ndarray, eos_id: int, ended: bool) -> np.ndarray:
    if not ended:
        return np.asarray(tokens, np.int32)
    out = np.empty(len(tokens) + 1, np.int32)
    out[:-1] = tokens
    out[-1] = eos_id
    return out
