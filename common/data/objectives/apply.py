"""Applies pretraining objectives: turns tokens into inputs, targets and loss weights. No model is known here.

An objective is a pure function of (seed, example number, tokens), so any process can make any example again. Inputs
and targets may be empty, and token id 0 may occur anywhere: lengths are explicit. Objectives over raw text work on many
pieces at once, in `common.data.objectives.denoising`.

Legend: I an example's input tokens, T its target tokens (both without padding), E examples, L tokens of a piece, P
tokens of many examples end to end, S sentinels.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from common.data.objectives import denoising
from common.data.objectives.config import (
    BertStyle,
    CausalLM,
    Deshuffling,
    FullLM,
    IidDenoising,
    PrefixLM,
    RawText,
    SpanCorruption,
    Supervised,
)
from common.data.objectives.spans import count_noise
from common.data.ragged import Ragged

PIECES_AT_ONCE = 1024
"""Blank pieces whose lengths are drawn at a time, which bounds memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One example before packing."""

    inputs_I: np.ndarray
    """int32."""
    targets_T: np.ndarray
    """int32, not shifted."""
    weights_T: np.ndarray
    """float32; the loss is the mean over target tokens with these weights."""


class SpecialIds(Protocol):
    """The part of a tokenizer that examples and batches use."""

    eos_id: int
    pad_id: int
    start_id: int
    content_hash: str
    sentinels: int

    @property
    def ordinary_ids(self) -> np.ndarray: ...

    def sentinel_id(self, k: int) -> int: ...


def fields(objective: object) -> tuple[str, ...]:
    """Returns the names of the fields of a record that the objective reads.

    >>> fields(CausalLM())
    ('text',)
    """
    return ("inputs", "targets") if isinstance(objective, Supervised) else ("text",)


def example_of_record(objective: Supervised | CausalLM, tokens: Mapping[str, np.ndarray], eos_id: int) -> Example:
    """Makes the example of one record, whose fields hold int32 `tokens`.

    >>> record = {"inputs": np.array([7, 0], np.int32), "targets": np.array([], np.int32)}
    >>> example = example_of_record(Supervised(), record, eos_id=1)
    >>> example.inputs_I.tolist(), example.targets_T.tolist(), example.weights_T.tolist()
    ([7, 0, 1], [1], [1.0])
    """
    match objective:
        case Supervised():
            inputs_I = _with_eos(tokens["inputs"], eos_id, objective.eos_after_inputs)
            targets_T = _with_eos(tokens["targets"], eos_id, objective.eos_after_targets)
        case CausalLM():
            inputs_I, targets_T = np.zeros(0, np.int32), _with_eos(tokens["text"], eos_id, objective.eos)
    return Example(inputs_I, targets_T, np.ones(len(targets_T), np.float32))


def record_lengths(
    objective: Supervised | CausalLM, token_lengths: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Computes input and target lengths, int64 [E] each, from the token lengths of the records' fields.

    >>> record_lengths(CausalLM(), {"text": np.array([0, 4])})
    (array([0, 0]), array([1, 5]))
    """
    match objective:
        case Supervised():
            inputs_E = np.asarray(token_lengths["inputs"], np.int64) + objective.eos_after_inputs
            return inputs_E, np.asarray(token_lengths["targets"], np.int64) + objective.eos_after_targets
        case CausalLM():
            targets_E = np.asarray(token_lengths["text"], np.int64) + objective.eos
            return np.zeros_like(targets_E), targets_E


def examples_of_pieces(
    objective: RawText, tokens_EL: np.ndarray, *, seed: int, number_E: np.ndarray, ids: SpecialIds, mode: Sequence[int]
) -> list[Example]:
    """Makes the examples of pieces of equal length, int32 [E, L]. The ids of `mode` begin all inputs.

    >>> import types
    >>> made = examples_of_pieces(FullLM(), np.array([[5, 6]]), seed=0, number_E=np.array([0]), ids=None, mode=())
    >>> made[0].inputs_I.tolist(), made[0].targets_T.tolist()
    ([], [5, 6])
    """
    inputs, targets = _denoise(objective, tokens_EL, seed, number_E, ids)
    if _eos_ends(objective):
        inputs, targets = inputs.framed((), (ids.eos_id,)), targets.framed((), (ids.eos_id,))
    if len(mode):
        inputs = inputs.framed(mode, ())
    ones_P = np.ones(len(targets.tokens_P), np.float32)
    weights = Ragged(tokens_P=ones_P, offsets=targets.offsets)
    return [Example(inputs[e], targets[e], weights[e]) for e in range(len(inputs))]


def examples_of_texts(
    objective: RawText,
    texts: Sequence[np.ndarray],
    *,
    seed: int,
    number_E: np.ndarray,
    ids: SpecialIds,
    mode: Sequence[int] = (),
) -> list[Example]:
    """As `examples_of_pieces`, for texts of any lengths, each at least `SHORTEST_PIECE`."""
    out: list[Example | None] = [None] * len(texts)
    for length, members in _by_length(np.array([len(text) for text in texts], np.int64)):
        tokens_EL = np.empty((len(members), length), np.int32)
        for row_L, member in zip(tokens_EL, members.tolist(), strict=True):
            row_L[:] = texts[member]
        made = examples_of_pieces(objective, tokens_EL, seed=seed, number_E=number_E[members], ids=ids, mode=mode)
        for member, example in zip(members.tolist(), made, strict=True):
            out[member] = example
    return [example for example in out if example is not None]


def text_lengths(
    objective: RawText, length_E: np.ndarray, *, seed: int, number_E: np.ndarray, ids: SpecialIds
) -> tuple[np.ndarray, np.ndarray]:
    """As `piece_lengths`, for texts of `length_E` tokens, each at least `SHORTEST_PIECE`."""
    inputs_E, targets_E = np.empty(len(number_E), np.int64), np.empty(len(number_E), np.int64)
    for length, members in _by_length(length_E):
        inputs_E[members], targets_E[members] = piece_lengths(
            objective, length, seed=seed, number_E=number_E[members], ids=ids
        )
    return inputs_E, targets_E


def piece_lengths(
    objective: RawText, length: int, *, seed: int, number_E: np.ndarray, ids: SpecialIds
) -> tuple[np.ndarray, np.ndarray]:
    """Computes input and target lengths, int64 [E] each, of the examples of pieces of `length` tokens.

    Mode ids are not counted. Lengths may depend on an example's draws but never on its tokens, so blank pieces serve.
    """
    same = not isinstance(objective, PrefixLM | IidDenoising)
    wanted = number_E[:1] if same else number_E
    inputs_E, targets_E = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.int64)
    for first in range(0, len(wanted), PIECES_AT_ONCE):
        chunk = slice(first, first + PIECES_AT_ONCE)
        blank_EL = np.zeros((len(wanted[chunk]), length), np.int32)
        made = _denoise(objective, blank_EL, seed, wanted[chunk], ids)
        inputs_E[chunk], targets_E[chunk] = (side.lengths + _eos_ends(objective) for side in made)
    if same:
        return np.repeat(inputs_E, len(number_E)), np.repeat(targets_E, len(number_E))
    return inputs_E, targets_E


def _by_length(length_E: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Groups texts by length, as (length, positions in `length_E`)."""
    return [(length, np.flatnonzero(length_E == length)) for length in np.unique(length_E).tolist()]


def _eos_ends(objective: RawText) -> bool:
    """Returns whether eos ends inputs and targets, as in T5's pretraining."""
    match objective:
        case FullLM():
            return False
        case PrefixLM(complementary=complementary):
            return not complementary
        case _:
            return True


def _denoise(
    objective: RawText, tokens_EL: np.ndarray, seed: int, number_E: np.ndarray, ids: SpecialIds
) -> denoising.Pairs:
    """Returns (inputs, targets), without eos and mode."""
    match objective:
        case FullLM():
            return denoising.full_lm(tokens_EL)
        case SpanCorruption(density=density, mean_span=mean_span):
            spans = count_noise(tokens_EL.shape[1], density, mean_span).spans
            return denoising.span_corruption(
                tokens_EL, seed, number_E, density=density, mean_span=mean_span, sentinels_S=_sentinels(ids, spans)
            )
        case IidDenoising(density=density):
            sentinels_S = _sentinels(ids, ids.sentinels)
            return denoising.iid_denoising(tokens_EL, seed, number_E, density=density, sentinels_S=sentinels_S)
        case BertStyle(density=density, random_share=random_share):
            return denoising.bert_style(
                tokens_EL,
                seed,
                number_E,
                density=density,
                random_share=random_share,
                mask_id=ids.sentinel_id(0),
                ordinary_X=ids.ordinary_ids,
            )
        case Deshuffling():
            return denoising.deshuffling(tokens_EL, seed, number_E)
        case PrefixLM(complementary=complementary):
            return denoising.prefix_lm(tokens_EL, seed, number_E, complementary=complementary)


def _sentinels(ids: SpecialIds, count: int) -> np.ndarray:
    return np.array([ids.sentinel_id(k) for k in range(count)], np.int32)


def _with_eos(tokens: np.ndarray, eos_id: int, add: bool) -> np.ndarray:
    """Returns int32 tokens, with eos appended if `add`."""
    if not add:
        return np.asarray(tokens, np.int32)
    out = np.empty(len(tokens) + 1, np.int32)
    out[:-1] = tokens
    out[-1] = eos_id
    return out
