"""Objectives over raw text, for many texts of one length at once.

Pure functions of (seed, index, tokens), which know no model, and of a tokenizer only ids. What they return has neither
padding nor eos; loss is on every target. The variants are those of Raffel et al. 2020 (arXiv 1910.10683), section 3.3.

Legend: E examples, L tokens of a raw text, S sentinels, X ordinary ids.
"""

import numpy as np

from common.data.objectives.draws import draw_bits, draw_uniform
from common.data.objectives.spans import corrupt, count_noise, draw_masks
from common.data.ragged import Ragged

Pairs = tuple[Ragged, Ragged]
"""(inputs, targets) of each example."""


def full_lm(tokens_EL: np.ndarray) -> Pairs:
    """All tokens are targets; there are no inputs.

    >>> inputs, targets = full_lm(np.array([[10, 11, 12]], np.int32))
    >>> inputs[0].tolist(), targets[0].tolist()
    ([], [10, 11, 12])
    """
    return _parts(tokens_EL, np.zeros(tokens_EL.shape, bool)), _equal(tokens_EL)


def span_corruption(
    tokens_EL: np.ndarray, seed: int, index_E: np.ndarray, *, density: float, mean_span: float, sentinels_S: np.ndarray
) -> Pairs:
    """Spans of noise are cut out, and are the targets: three of ten tokens here, in two spans.

    >>> text, sentinels = np.arange(10, 20, dtype=np.int32)[None], np.array([99, 98], np.int32)
    >>> inputs, targets = span_corruption(text, 0, np.array([3]), density=0.3, mean_span=1.5, sentinels_S=sentinels)
    >>> inputs[0].tolist(), targets[0].tolist()
    ([10, 11, 12, 13, 14, 99, 17, 18, 98], [99, 15, 16, 98, 19])
    """
    counts = count_noise(tokens_EL.shape[1], density, mean_span)
    return corrupt(tokens_EL, draw_masks(counts, seed, index_E), sentinels_S)


def iid_denoising(
    tokens_EL: np.ndarray, seed: int, index_E: np.ndarray, *, density: float, sentinels_S: np.ndarray
) -> Pairs:
    """As span corruption, but each token is noise or not by its own draw; neighbours that are noise make one span.

    What is kept behind the last span takes a sentinel too, so noise behind one span fewer than there are sentinels is
    left as it is.

    >>> text, sentinels = np.arange(10, 20, dtype=np.int32)[None], np.array([99, 98, 97], np.int32)
    >>> inputs, targets = iid_denoising(text, 0, np.array([5]), density=0.3, sentinels_S=sentinels)
    >>> inputs[0].tolist(), targets[0].tolist()
    ([10, 11, 99, 13, 14, 15, 98, 17, 18, 19], [99, 12, 98, 16, 97])
    """
    noise_EL = draw_uniform(seed, index_E, tokens_EL.shape[1]) < density
    first_EL = noise_EL.copy()
    first_EL[:, 1:] &= ~noise_EL[:, :-1]
    return corrupt(tokens_EL, noise_EL & (np.cumsum(first_EL, axis=1) < len(sentinels_S)), sentinels_S)


def bert_style(
    tokens_EL: np.ndarray,
    seed: int,
    index_E: np.ndarray,
    *,
    density: float,
    random_share: float,
    mask_id: int,
    ordinary_X: np.ndarray,
) -> Pairs:
    """The text with `density` of its tokens masked, `random_share` of these by random tokens; to the whole text.

    Random tokens are drawn from `ordinary_X`, the ids that texts consist of. Devlin et al. 2019 (arXiv 1810.04805) as
    T5 adapts it; with no random tokens it is the MASS style there. Below, 99 is the mask and 4 came by chance.

    >>> text, share = np.arange(10, 20, dtype=np.int32)[None], {"density": 0.4, "random_share": 0.25}
    >>> inputs, targets = bert_style(text, 0, np.array([7]), **share, mask_id=99, ordinary_X=np.arange(3, 10))
    >>> inputs[0].tolist(), targets[0].tolist() == text[0].tolist()
    ([10, 11, 99, 13, 14, 99, 99, 17, 4, 99], True)
    """
    L = tokens_EL.shape[1]
    draws_EX = draw_uniform(seed, index_E, 2 * L)
    noise_EL = draws_EX[:, :L]
    any_EL = ordinary_X[(draws_EX[:, L:] * len(ordinary_X)).astype(np.int64)].astype(np.int32)
    masks_EL = np.where(noise_EL < density * random_share, any_EL, np.int32(mask_id))
    return _equal(np.where(noise_EL < density, masks_EL, tokens_EL)), _equal(tokens_EL)


def deshuffling(tokens_EL: np.ndarray, seed: int, index_E: np.ndarray) -> Pairs:
    """The text's tokens in any order, to the text (Liu et al. 2019, arXiv 1910.00998).

    >>> inputs, targets = deshuffling(np.arange(10, 16, dtype=np.int32)[None], 0, np.array([3]))
    >>> inputs[0].tolist(), targets[0].tolist()
    ([14, 13, 12, 15, 11, 10], [10, 11, 12, 13, 14, 15])
    """
    order_EL = np.argsort(draw_bits(seed, index_E, tokens_EL.shape[1]), axis=1)
    return _equal(np.take_along_axis(tokens_EL, order_EL, axis=1)), _equal(tokens_EL)


def prefix_lm(tokens_EL: np.ndarray, seed: int, index_E: np.ndarray, *, complementary: bool) -> Pairs:
    """Texts cut in two at a random place, with at least a token on either side.

    Where `complementary`, examples 2n and 2n + 1 share a draw: the one is cut behind s tokens, the other behind L - s,
    so that together they fill L input and L target slots, and an encoder-decoder has no padding (Wang et al. 2022,
    arXiv 2204.05832).

    >>> texts = np.arange(10, dtype=np.int32).reshape(2, 5)
    >>> inputs, targets = prefix_lm(texts, 0, np.array([0, 1]), complementary=True)
    >>> len(inputs.tokens_P), len(targets.tokens_P)
    (5, 5)
    """
    L = tokens_EL.shape[1]
    draw_E = draw_uniform(seed, index_E // 2 if complementary else index_E, 1)[:, 0]
    place_E = 1 + (draw_E * (L - 1)).astype(np.int64)
    if complementary:
        place_E = np.where(index_E % 2, L - place_E, place_E)
    before_EL = np.arange(L) < place_E[:, None]
    return _parts(tokens_EL, before_EL), _parts(tokens_EL, ~before_EL)


def _equal(tokens_EL: np.ndarray) -> Ragged:
    return _parts(tokens_EL, np.ones(tokens_EL.shape, bool))


def _parts(tokens_EL: np.ndarray, kept_EL: np.ndarray) -> Ragged:
    return Ragged(tokens_P=tokens_EL[kept_EL], offsets=np.append(0, np.cumsum(kept_EL.sum(axis=1))))
