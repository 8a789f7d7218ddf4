"""Objectives over raw text, for many pieces of one length at once.

Each is a pure function of (seed, example number, tokens). It knows no model, and only ids of a tokenizer. The returned
inputs and targets have neither padding nor eos; every target counts in the loss. The variants are those of Raffel et
al. 2020 (arXiv 1910.10683), section 3.3.

Legend: E examples, L tokens of a piece, S sentinels, X ordinary ids.
"""

import numpy as np

from common.data.objectives.draws import draw_bits, draw_uniform
from common.data.objectives.spans import corrupt, count_noise, draw_masks
from common.data.ragged import Ragged

Pairs = tuple[Ragged, Ragged]
"""(inputs, targets) of each example."""


def full_lm(tokens_EL: np.ndarray) -> Pairs:
    """Makes all tokens targets, with no inputs.

    >>> inputs, targets = full_lm(np.array([[10, 11, 12]], np.int32))
    >>> inputs[0].tolist(), targets[0].tolist()
    ([], [10, 11, 12])
    """
    return _selected(tokens_EL, np.zeros(tokens_EL.shape, bool)), _whole(tokens_EL)


def span_corruption(
    tokens_EL: np.ndarray, seed: int, number_E: np.ndarray, *, density: float, mean_span: float, sentinels_S: np.ndarray
) -> Pairs:
    """Cuts spans of noise out of each text and makes them its targets.

    Here, three of ten tokens are noise, in two spans:

    >>> text, sentinels = np.arange(10, 20, dtype=np.int32)[None], np.array([99, 98], np.int32)
    >>> inputs, targets = span_corruption(text, 0, np.array([3]), density=0.3, mean_span=1.5, sentinels_S=sentinels)
    >>> inputs[0].tolist(), targets[0].tolist()
    ([10, 11, 12, 13, 14, 99, 17, 18, 98], [99, 15, 16, 98, 19])
    """
    counts = count_noise(tokens_EL.shape[1], density, mean_span)
    return corrupt(tokens_EL, draw_masks(counts, seed, number_E), sentinels_S)


def iid_denoising(
    tokens_EL: np.ndarray, seed: int, number_E: np.ndarray, *, density: float, sentinels_S: np.ndarray
) -> Pairs:
    """As `span_corruption`, but draws for each token whether it is noise; adjacent noise makes one span.

    Tokens kept after the last span need a sentinel in the targets, so only the first S - 1 spans are cut out; later
    noise stays in the inputs.

    >>> text, sentinels = np.arange(10, 20, dtype=np.int32)[None], np.array([99, 98, 97], np.int32)
    >>> inputs, targets = iid_denoising(text, 0, np.array([5]), density=0.3, sentinels_S=sentinels)
    >>> inputs[0].tolist(), targets[0].tolist()
    ([10, 11, 99, 13, 14, 15, 98, 17, 18, 19], [99, 12, 98, 16, 97])
    """
    noise_EL = draw_uniform(seed, number_E, tokens_EL.shape[1]) < density
    first_EL = noise_EL.copy()
    first_EL[:, 1:] &= ~noise_EL[:, :-1]
    return corrupt(tokens_EL, noise_EL & (np.cumsum(first_EL, axis=1) < len(sentinels_S)), sentinels_S)


def bert_style(
    tokens_EL: np.ndarray,
    seed: int,
    number_E: np.ndarray,
    *,
    density: float,
    random_share: float,
    mask_id: int,
    ordinary_X: np.ndarray,
) -> Pairs:
    """Replaces a share `density` of each text's tokens; the targets are the whole text.

    A share `random_share` of the replaced tokens become random ones from `ordinary_X`, the ids that texts consist of;
    the others become `mask_id`. This is T5's adaptation of BERT's objective (Devlin et al. 2019, arXiv 1810.04805);
    without random tokens it is T5's MASS style. Below, 99 is the mask and 4 a random token.

    >>> text, share = np.arange(10, 20, dtype=np.int32)[None], {"density": 0.4, "random_share": 0.25}
    >>> inputs, targets = bert_style(text, 0, np.array([7]), **share, mask_id=99, ordinary_X=np.arange(3, 10))
    >>> inputs[0].tolist(), targets[0].tolist() == text[0].tolist()
    ([10, 11, 99, 13, 14, 99, 99, 17, 4, 99], True)
    """
    L = tokens_EL.shape[1]
    draws_EX = draw_uniform(seed, number_E, 2 * L)
    noise_EL = draws_EX[:, :L]
    any_EL = ordinary_X[(draws_EX[:, L:] * len(ordinary_X)).astype(np.int64)].astype(np.int32)
    masks_EL = np.where(noise_EL < density * random_share, any_EL, np.int32(mask_id))
    return _whole(np.where(noise_EL < density, masks_EL, tokens_EL)), _whole(tokens_EL)


def deshuffling(tokens_EL: np.ndarray, seed: int, number_E: np.ndarray) -> Pairs:
    """Shuffles each text's tokens; the targets are the text in order (Liu et al. 2019, arXiv 1910.00998).

    >>> inputs, targets = deshuffling(np.arange(10, 16, dtype=np.int32)[None], 0, np.array([3]))
    >>> inputs[0].tolist(), targets[0].tolist()
    ([14, 13, 12, 15, 11, 10], [10, 11, 12, 13, 14, 15])
    """
    order_EL = np.argsort(draw_bits(seed, number_E, tokens_EL.shape[1]), axis=1)
    return _whole(np.take_along_axis(tokens_EL, order_EL, axis=1)), _whole(tokens_EL)


def prefix_lm(tokens_EL: np.ndarray, seed: int, number_E: np.ndarray, *, complementary: bool) -> Pairs:
    """Cuts each text in two at random, with at least one token on either side.

    If `complementary`, examples 2n and 2n + 1 share a draw: one is cut after s tokens, the other after L - s. Together
    they fill L input and L target slots, and an encoder-decoder has no padding (Wang et al. 2022, arXiv 2204.05832).

    >>> texts = np.arange(10, dtype=np.int32).reshape(2, 5)
    >>> inputs, targets = prefix_lm(texts, 0, np.array([0, 1]), complementary=True)
    >>> len(inputs.tokens_P), len(targets.tokens_P)
    (5, 5)
    """
    L = tokens_EL.shape[1]
    draw_E = draw_uniform(seed, number_E // 2 if complementary else number_E, 1)[:, 0]
    cut_E = 1 + (draw_E * (L - 1)).astype(np.int64)
    if complementary:
        cut_E = np.where(number_E % 2, L - cut_E, cut_E)
    before_EL = np.arange(L) < cut_E[:, None]
    return _selected(tokens_EL, before_EL), _selected(tokens_EL, ~before_EL)


def _whole(tokens_EL: np.ndarray) -> Ragged:
    """Returns all tokens of every text."""
    return _selected(tokens_EL, np.ones(tokens_EL.shape, bool))


def _selected(tokens_EL: np.ndarray, kept_EL: np.ndarray) -> Ragged:
    """Returns the tokens of each text where `kept_EL` is True."""
    return Ragged(tokens_P=tokens_EL[kept_EL], offsets=np.append(0, np.cumsum(kept_EL.sum(axis=1))))
