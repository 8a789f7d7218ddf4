"""Objectives over raw text: T5's published counts, invariants of every example, and distributions."""

import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import stats

from common.data.objectives.denoising import Pairs, bert_style, deshuffling, iid_denoising, prefix_lm, span_corruption
from common.data.objectives.draws import draw_bits, draw_subset, draw_uniform
from common.data.objectives.spans import Noise, corrupt, count_noise, draw_masks, fit_inputs

SENTINELS = np.arange(999, 799, -1, dtype=np.int32)
VOCAB = 800
TEXTS = np.random.default_rng(0).integers(0, VOCAB, (40, 57)).astype(np.int32)
NUMBERS = np.arange(100, 140)

OBJECTIVES: dict[str, Callable[..., Pairs]] = {
    "spans": partial(span_corruption, density=0.15, mean_span=3.0, sentinels_S=SENTINELS),
    "long-spans": partial(span_corruption, density=0.5, mean_span=8.0, sentinels_S=SENTINELS),
    "iid": partial(iid_denoising, density=0.15, sentinels_S=SENTINELS),
    "bert": partial(bert_style, density=0.15, random_share=0.1, mask_id=999, ordinary_X=np.arange(VOCAB)),
    "deshuffling": deshuffling,
    "prefix": partial(prefix_lm, complementary=False),
    "pairs": partial(prefix_lm, complementary=True),
}
objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


def restored(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """Restores a text from its corrupted inputs and targets: tokens after a sentinel in the targets replace it."""
    spans: dict[int, list[int]] = {}
    for token in targets.tolist():
        if token >= VOCAB:
            spans[token] = last = []
        else:
            last.append(token)
    return list(itertools.chain.from_iterable(spans.get(token, [token]) for token in inputs.tolist()))


# --- Counts


@pytest.mark.parametrize(
    ("inputs", "density", "mean_span", "raw", "targets", "noise", "spans"),
    [
        (512, 0.15, 3.0, 568, 114, 85, 28),
        (512, 0.15, 8.0, 588, 100, 88, 11),
        (512, 0.5, 3.0, 766, 512, 383, 128),
        (512, 0.5, 8.0, 908, 512, 454, 57),
        (512, 0.15, 64.0, 600, 92, 90, 1),
        (512, 0.5, 64.0, 1006, 512, 503, 8),
        (512, 0.15, 32.0, 598, 94, 90, 3),
        (256, 0.15, 3.0, 284, 58, 43, 14),
        (1024, 0.15, 3.0, 1137, 229, 171, 57),
        (2048, 0.15, 3.0, 2274, 456, 341, 114),
    ],
)
def test_counts_equal_those_of_t5(
    inputs: int, density: float, mean_span: float, raw: int, targets: int, noise: int, spans: int
) -> None:
    """The expected counts are those of T5's and UL2's published code."""
    found = fit_inputs(inputs, density, mean_span)
    assert found == Noise(raw, noise, spans)
    assert found.targets == targets and found.inputs <= inputs


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.5, 3.0), (0.5, 64.0), (0.01, 1.0), (0.99, 1.0)])
def test_counts_are_always_possible(density: float, mean_span: float) -> None:
    for length in range(2, 200):
        found = count_noise(length, density, mean_span)
        assert 1 <= found.spans <= found.noise <= length - 1
        assert found.spans <= length - found.noise


def test_halves_are_rounded_to_even_exactly() -> None:
    """0.15 has no exact binary form, so products of floats fall on either side of a half."""
    assert [count_noise(n, 0.15, 3.0).noise for n in (10, 30, 50, 190, 350, 390, 670)] == [2, 4, 8, 28, 52, 58, 100]


# --- Invariants


@objectives
def test_an_example_depends_only_on_seed_number_and_tokens(objective: Callable[..., Pairs]) -> None:
    together = objective(TEXTS, 3, NUMBERS)
    for row in (0, 17, 39):
        rows = slice(row, row + 2) if row % 2 == 0 else slice(row, row + 1)
        alone = objective(TEXTS[rows], 3, NUMBERS[rows])
        for all_of_them, one in zip(together, alone, strict=True):
            np.testing.assert_array_equal(one[0], all_of_them[row])
    other = objective(TEXTS, 4, NUMBERS)
    assert any(a[i].tolist() != b[i].tolist() for a, b in zip(together, other, strict=True) for i in range(40))


@objectives
def test_arrays_are_int32_and_texts_are_not_modified(objective: Callable[..., Pairs]) -> None:
    before = TEXTS.copy()
    for made in objective(TEXTS, 0, NUMBERS):
        assert made.tokens_P.dtype == np.int32 and made.offsets.dtype == np.int64
        assert len(made) == len(TEXTS) and made.offsets[-1] == len(made.tokens_P)
    np.testing.assert_array_equal(TEXTS, before)


@pytest.mark.parametrize("name", ["spans", "long-spans", "iid"])
def test_no_token_is_lost(name: str) -> None:
    inputs, targets = OBJECTIVES[name](TEXTS, 0, NUMBERS)
    for i, text in enumerate(TEXTS):
        if inputs[i][0] < VOCAB:  # i.i.d. noise may begin a text, and targets then begin with it
            assert restored(inputs[i], targets[i]) == text.tolist()


@pytest.mark.parametrize("name", ["spans", "long-spans"])
def test_spans_are_laid_out_as_in_t5(name: str) -> None:
    """Lengths are exact, a text begins with a kept token and ends with noise, and sentinels come in order."""
    how: Any = OBJECTIVES[name]
    counts = count_noise(TEXTS.shape[1], how.keywords["density"], how.keywords["mean_span"])
    inputs, targets = how(TEXTS, 0, NUMBERS)
    assert set(inputs.lengths) == {counts.inputs - 1} and set(targets.lengths) == {counts.targets - 1}
    expected = SENTINELS[: counts.spans].tolist()
    for i in range(len(TEXTS)):
        assert inputs[i][0] == TEXTS[i, 0] and inputs[i][-1] == expected[-1]
        assert targets[i][0] == expected[0] and targets[i][-1] == TEXTS[i, -1]
        assert [x for x in inputs[i].tolist() if x >= VOCAB] == expected
        assert [x for x in targets[i].tolist() if x >= VOCAB] == expected


def test_too_few_sentinels_are_an_error() -> None:
    mask = np.array([[False, True, False, True]])
    with pytest.raises(AssertionError, match="more spans than sentinels"):
        corrupt(TEXTS[:1, :4], mask, SENTINELS[:1])


@pytest.mark.parametrize("sentinels", [1, 2, 3, 10])
def test_noise_beyond_the_last_sentinel_stays_in_the_inputs(sentinels: int) -> None:
    """Also if the text begins with noise or ends with kept tokens, which need one more sentinel."""
    inputs, targets = iid_denoising(TEXTS, 0, NUMBERS, density=0.5, sentinels_S=SENTINELS[:sentinels])
    full, _ = iid_denoising(TEXTS, 0, NUMBERS, density=0.5, sentinels_S=SENTINELS)
    for i, text in enumerate(TEXTS.tolist()):
        both = [*inputs[i].tolist(), *targets[i].tolist()]
        assert sorted(token for token in both if token < VOCAB) == sorted(text)
        assert np.count_nonzero(inputs[i] >= VOCAB) == min(sentinels - 1, np.count_nonzero(full[i] >= VOCAB))
        assert np.count_nonzero(targets[i] >= VOCAB) <= sentinels


# --- Distributions


def uniform(counts: Counter, cases: int) -> None:
    """Asserts by a chi-square test that all `cases` are equally likely; a correct generator fails once in a million."""
    assert len(counts) == cases
    assert stats.chisquare(list(counts.values())).pvalue > 1e-6


def test_masks_are_equally_likely() -> None:
    """6 kept tokens can be cut into 3 spans in 10 ways, 5 corrupted ones in 6."""
    masks = draw_masks(Noise(11, 5, 3), 0, np.arange(30_000))
    assert (masks.sum(axis=1) == 5).all() and not masks[:, 0].any() and masks[:, -1].all()
    uniform(Counter(map(bytes, masks)), 60)


def test_orders_and_cuts_are_equally_likely() -> None:
    text, numbers = np.broadcast_to(np.arange(4, dtype=np.int32), (24_000, 4)), np.arange(24_000)
    shuffled = deshuffling(text, 0, numbers)[0]
    uniform(Counter(map(bytes, shuffled.tokens_P.reshape(-1, 4))), 24)
    for complementary in (False, True):
        inputs, _ = prefix_lm(text, 0, numbers, complementary=complementary)
        uniform(Counter(inputs.lengths.tolist()), 3)


def test_subsets_and_bits_are_uniform() -> None:
    numbers = np.arange(20_000)
    uniform(Counter(map(bytes, draw_subset(draw_bits(1, numbers, 5), 2))), 10)
    assert not draw_subset(draw_bits(1, numbers, 5), 0).any()
    values = draw_uniform(0, numbers, 8)
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-6
    neighbours = np.corrcoef(np.concatenate([values[:-1].T, values[1:].T]))
    assert np.abs(neighbours - np.eye(16)).max() < 0.04
    assert not np.isin(draw_bits(1, numbers[:100], 8), draw_bits(0, numbers, 8)).any()


def test_complementary_pairs_fill_both_sides() -> None:
    inputs, targets = OBJECTIVES["pairs"](TEXTS, 0, NUMBERS)
    for first in range(0, len(TEXTS), 2):
        assert inputs.lengths[first : first + 2].sum() == targets.lengths[first : first + 2].sum() == TEXTS.shape[1]
    for i, text in enumerate(TEXTS):
        assert [*inputs[i], *targets[i]] == text.tolist() and min(len(inputs[i]), len(targets[i])) > 0


def test_shares_of_masked_and_random_tokens() -> None:
    texts = np.full((200, 500), 5, np.int32)
    made = partial(bert_style, texts, 0, np.arange(200), density=0.15, mask_id=999, ordinary_X=np.arange(VOCAB))
    inputs, targets = made(random_share=0.1)
    assert (targets.tokens_P == 5).all()
    masked, random = (inputs.tokens_P == 999).sum(), (~np.isin(inputs.tokens_P, (5, 999))).sum()
    for seen, share in ((masked, 0.15 * 0.9), (random, 0.15 * 0.1 * (1 - 1 / VOCAB))):
        assert stats.binomtest(int(seen), texts.size, share).pvalue > 1e-6
    assert inputs.tokens_P[~np.isin(inputs.tokens_P, (5, 999))].max() < VOCAB
    mass, _ = made(random_share=0.0)
    assert set(mass.tokens_P.tolist()) == {5, 999}
