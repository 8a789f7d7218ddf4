"""Compares beam search with an enumeration of all texts, and with a plain search that recomputes everything."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.infer.beam import BeamDecoder, penalty
from common.infer.config import Beam, Greedy, Limits
from common.infer.decode import Decoded, Decoder, Seeds, decoding_weights
from common.infer.prompt import pad_prompts
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from tests.common.infer.toy import Toy, log_probs, toy

PROMPTS = [[2, 3], [], [3], [0, 1, 2]]
SLOTS, VOCAB = 6, 7

Text = tuple[float, tuple[int, ...], bool]
"""Score, tokens, whether ended."""


@functools.cache
def decoder_of(method: Beam | Greedy, eos_ids: tuple[int, ...]) -> BeamDecoder | Decoder:
    """Returns a decoder; it does not depend on parameters, so all toys share it."""
    if isinstance(method, Greedy):
        return Decoder(toy(VOCAB), method, eos_ids)
    return BeamDecoder(toy(VOCAB), method, eos_ids)


def search(
    method: Beam | Greedy,
    limits: Limits,
    *,
    vocab: int = VOCAB,
    seed: int = 0,
    eos_ids: tuple[int, ...] = (1,),
    prompts: list[list[int]] = PROMPTS,
    chunk: int = SLOTS,
) -> Decoded:
    model, decoder = toy(vocab, seed=seed), decoder_of(method, eos_ids)
    weights, rows = decoding_weights(model, model.params), len(prompts)
    seeds = Seeds(seed=0, prompts_B=np.zeros(rows, np.uint32), samples_B=np.zeros(rows, np.uint32))
    prompt = pad_prompts([np.array(p, np.int32) for p in prompts], [0] * rows, rows=rows)
    state = decoder.start(weights, prompt, seeds, np.ones(rows, bool), slots=SLOTS)
    for until in range(chunk, limits.max_new_tokens + chunk, chunk):
        state = decoder.advance(weights, state, limits, until=until)
    return decoder.read(state)


def texts(found: Decoded, row: int) -> list[Text]:
    return [
        (float(score), tuple(tokens[:length].tolist()), bool(ended))
        for score, tokens, length, ended in zip(
            found.scores_BR[row], found.tokens_BRT[row], found.lengths_BR[row], found.ended_BR[row], strict=True
        )
        if score > -np.inf
    ]


def divisor(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def all_texts(
    model: Toy, inputs: list[int], vocab: int, eos_ids: tuple[int, ...], limits: Limits, alpha: float
) -> list[Text]:
    """Lists every text that ends, best first."""
    not_ends = [token for token in range(vocab) if token not in eos_ids]
    found = []
    for length in range(max(1, limits.min_new_tokens + 1), limits.max_new_tokens + 1):
        for body in itertools.product(not_ends, repeat=length - 1):
            rows = log_probs(model, inputs, 0, list(body))
            before = rows[np.arange(length - 1), list(body)].sum()
            found += [((before + rows[-1, e]) / divisor(length, alpha), (*body, e), True) for e in eos_ids]
    return sorted(found, reverse=True)


def same(found: list[Text], expected: list[Text]) -> None:
    assert [text[1:] for text in found] == [text[1:] for text in expected]
    np.testing.assert_allclose([text[0] for text in found], [text[0] for text in expected], rtol=2e-5)


@pytest.mark.parametrize(
    ("alpha", "vocab", "eos_ids"),
    [
        pytest.param(alpha, 4, eos_ids, marks=[] if alpha in quick else pytest.mark.slow)
        for eos_ids, quick in (((1,), (0.0, 0.6)), ((1, 3), (3.0, -1.0)))
        for alpha in (0.0, 0.6, 1.0, 3.0, -1.0)
    ],
)
def test_a_wide_beam_finds_the_best_of_all_texts(alpha: float, vocab: int, eos_ids: tuple[int, ...]) -> None:
    """With as many beams as there are live texts, nothing is lost, and the order is exact."""
    limits, size = Limits(max_new_tokens=4), 81
    for seed in range(2):
        found = search(Beam(size=size, length_penalty=alpha), limits, vocab=vocab, seed=seed, eos_ids=eos_ids)
        for row, inputs in enumerate(PROMPTS):
            expected = all_texts(toy(vocab, seed=seed), inputs, vocab, eos_ids, limits, alpha)[:size]
            ended = [text for text in texts(found, row) if text[2]]
            same(ended, expected[: len(ended)])
            assert len(ended) == min(size, len(expected))


def plain_search(
    model: Toy, inputs: list[int], vocab: int, eos_ids: tuple[int, ...], limits: Limits, size: int, alpha: float
) -> list[Text]:
    """Does the same search without a bound or a cache: it never stops early."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[Text] = []
    for step in range(limits.max_new_tokens):
        candidates = []
        for total, tokens in live:
            scores = log_probs(model, inputs, 0, list(tokens))[-1]
            candidates += [
                (total + scores[v], (*tokens, v))
                for v in range(vocab)
                if v not in eos_ids or step >= limits.min_new_tokens
            ]
        candidates = sorted(candidates, reverse=True)[: size * (1 + len(eos_ids))]
        ends = [(s / divisor(step + 1, alpha), t, True) for s, t in candidates if t[-1] in eos_ids]
        finished = sorted(finished + ends, reverse=True)[:size]
        live = [(s, t) for s, t in candidates if t[-1] not in eos_ids][:size]
    unfinished = [(s / divisor(limits.max_new_tokens, alpha), t, False) for s, t in live]
    return [*finished, *sorted(unfinished, reverse=True)][:size]


@pytest.mark.parametrize(
    ("size", "alpha"),
    [
        pytest.param(1, 0.6, marks=pytest.mark.slow),
        pytest.param(2, 0.0, marks=pytest.mark.slow),
        (2, 2.0),
        (5, 0.6),
    ],
)
@pytest.mark.parametrize(
    ("limits", "eos_ids"),
    [
        (Limits(max_new_tokens=6), (1,)),
        (Limits(max_new_tokens=5, min_new_tokens=3), (1,)),
        (Limits(max_new_tokens=4), (0, 2)),
        (Limits(max_new_tokens=3), ()),
        (Limits(max_new_tokens=3, min_new_tokens=3), (1,)),
    ],
    ids=["no-minimum", "minimum", "two-ends", "no-end", "never-ends"],
)
def test_narrow_beams(size: int, alpha: float, limits: Limits, eos_ids: tuple[int, ...]) -> None:
    """The bound stops rows early without losing a text; caches follow their beams."""
    for seed in (0, 1, 2):
        found = search(Beam(size=size, length_penalty=alpha), limits, seed=seed, eos_ids=eos_ids)
        for row, inputs in enumerate(PROMPTS):
            expected = plain_search(toy(VOCAB, seed=seed), inputs, VOCAB, eos_ids, limits, size, alpha)
            ended = [text for text in expected if text[2]]
            have = texts(found, row)
            same(have[: len(ended)], ended)
            if len(ended) < size:
                same(have, expected)


def test_some_rows_stop_early() -> None:
    """So the test above does test the bound."""
    model, decoder = toy(VOCAB), decoder_of(Beam(size=1, length_penalty=0.0), (1,))
    weights = decoding_weights(model, model.params)
    seeds = Seeds(seed=0, prompts_B=np.zeros(1, np.uint32), samples_B=np.zeros(1, np.uint32))
    steps = []
    for p in PROMPTS:
        prompt = pad_prompts([np.array(p, np.int32)], [0], rows=1)
        state = decoder.start(weights, prompt, seeds, np.ones(1, bool), slots=SLOTS)
        steps.append(int(decoder.advance(weights, state, Limits(max_new_tokens=6)).step))
    assert min(steps) < 6


def test_batch_composition_and_calls_do_not_change_texts() -> None:
    """Texts and their order stay; programs for other numbers of rows may round scores differently."""
    method, limits = Beam(size=5, length_penalty=0.6), Limits(max_new_tokens=6)
    together = search(method, limits)
    chunked = search(method, limits, chunk=2)
    for row, p in enumerate(PROMPTS):
        alone = search(method, limits, prompts=[p])
        same(texts(alone, 0), texts(together, row))
        same(texts(chunked, row), texts(together, row))


def test_one_beam_without_penalty_or_end_is_greedy() -> None:
    limits = Limits(max_new_tokens=6)
    beam = search(Beam(size=1, length_penalty=0.0), limits, eos_ids=())
    greedy = search(Greedy(), limits, eos_ids=())
    assert (beam.tokens_BRT == greedy.tokens_BRT).all()
    np.testing.assert_allclose(beam.log_probs_BRT, greedy.log_probs_BRT, rtol=1e-5)


def test_token_log_probabilities_add_up() -> None:
    found = search(Beam(size=5, length_penalty=0.6), Limits(max_new_tokens=6))
    for row in range(len(PROMPTS)):
        for place, (score, tokens, _) in enumerate(texts(found, row)):
            total = found.log_probs_BRT[row, place, : len(tokens)].sum()
            assert total / divisor(len(tokens), 0.6) == pytest.approx(score, rel=1e-5)


def test_penalty_by_hand() -> None:
    assert float(penalty(jnp.int32(1), 0.6)) == 1.0
    assert float(penalty(jnp.int32(7), 1.0)) == 2.0
    assert float(penalty(jnp.int32(19), 0.5)) == pytest.approx(math.sqrt(4))


def test_beam_search_on_eight_devices() -> None:
    method, limits = Beam(size=2), Limits(max_new_tokens=5)
    prompts = PROMPTS * 2
    expected = search(method, limits, prompts=prompts)
    mesh = make_mesh(MeshShape(data=8))
    with jax.set_mesh(mesh):
        found = search(method, limits, prompts=prompts)
    for row in range(len(prompts)):
        same(texts(found, row), texts(expected, row))
