"""Greedy decoding and sampling on a toy model; test_models.py tests the families."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.infer.config import Greedy, Limits, Sample
from common.infer.decode import Decoded, Decoder, Seeds, decoding_weights, first_argmax
from common.infer.prompt import bucket, pad_prompts
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from tests.common.infer.toy import log_probs, toy

VOCAB, EOS = 11, 3
MODEL = toy(VOCAB, seed=2)
PROMPTS = [[5, 6, 7], [], [3], [10, 10, 2, 4, 8], [9, 0, 9]]
SLOTS = 16


@functools.cache
def decoder_of(method: Greedy | Sample, eos_ids: tuple[int, ...]) -> Decoder:
    return Decoder(MODEL, method, eos_ids)


def decode(
    method: Greedy | Sample,
    limits: Limits,
    prompts: list[list[int]] = PROMPTS,
    *,
    eos_ids: tuple[int, ...] = (EOS,),
    rows: int | None = None,
    samples: list[int] | None = None,
    seed: int = 0,
    chunk: int = SLOTS,
    start: int = 0,
) -> Decoded:
    """Decodes as one batch, `chunk` steps per call; a row's seed is its prompt's length and sum."""
    rows = rows or len(prompts)
    weights, decoder = decoding_weights(MODEL, MODEL.params), decoder_of(method, eos_ids)
    missing = [0] * (rows - len(prompts))
    seeds = Seeds(
        seed=seed,
        prompts_B=np.array([100 * len(p) + sum(p) for p in prompts] + missing, np.uint32),
        samples_B=np.array((samples or [0] * len(prompts)) + missing, np.uint32),
    )
    prompt = pad_prompts([np.array(p, np.int32) for p in prompts], [start] * len(prompts), rows=rows)
    state = decoder.start(weights, prompt, seeds, np.arange(rows) < len(prompts), slots=SLOTS)
    for until in range(chunk, limits.max_new_tokens + chunk, chunk):
        state = decoder.advance(weights, state, limits, until=until)
    return decoder.read(state)


def texts(found: Decoded) -> list[list[int]]:
    return [
        row[0, : length[0]].tolist()
        for row, length in zip(found.tokens_BRT, found.lengths_BR, strict=True)
        if length[0]
    ]


def greedily(inputs: list[int], limits: Limits, eos_ids: tuple[int, ...] = (EOS,), start: int = 0) -> list[int]:
    """Decodes greedily by recomputing everything for every token."""
    made: list[int] = []
    while len(made) < limits.max_new_tokens:
        scores = log_probs(MODEL, inputs, start, made)[-1]
        if len(made) < limits.min_new_tokens:
            scores[list(eos_ids)] = -np.inf
        made.append(int(scores.argmax()))
        if made[-1] in eos_ids:
            break
    return made


@pytest.mark.parametrize(("least", "most"), [(0, 16), (5, 16), (3, 7), (9, 9), (0, 1)])
@pytest.mark.parametrize("eos_ids", [(EOS,), (), (3, 4, 7)], ids=str)
def test_greedy_is_argmax_by_argmax(eos_ids: tuple[int, ...], least: int, most: int) -> None:
    limits = Limits(max_new_tokens=most, min_new_tokens=least)
    found = decode(Greedy(), limits, eos_ids=eos_ids)
    assert texts(found) == [greedily(p, limits, eos_ids) for p in PROMPTS]
    assert found.ended_BR[:, 0].tolist() == [text[-1] in eos_ids for text in texts(found)]


def test_lengths_differ_in_the_test_above() -> None:
    lengths = {len(greedily(p, Limits(max_new_tokens=16))) for p in PROMPTS}
    assert len(lengths) > 2


def test_start_tokens_matter() -> None:
    limits = Limits(max_new_tokens=8)
    assert texts(decode(Greedy(), limits, start=3)) == [greedily(p, limits, start=3) for p in PROMPTS]


@pytest.mark.parametrize("method", [Greedy(), Sample(temperature=1.3, top_k=6, top_p=0.95)], ids=["greedy", "sample"])
def test_log_probabilities_are_the_models_own(method: Greedy | Sample) -> None:
    found = decode(method, Limits(max_new_tokens=12, min_new_tokens=4))
    for row, (inputs, made) in enumerate(zip(PROMPTS, texts(found), strict=True)):
        expected = log_probs(MODEL, inputs, 0, made[:-1])[np.arange(len(made)), made]
        np.testing.assert_allclose(found.log_probs_BRT[row, 0, : len(made)], expected, atol=2e-5)
        np.testing.assert_allclose(found.scores_BR[row, 0], expected.sum(), atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 5, 16])
@pytest.mark.parametrize("method", [Greedy(), Sample(temperature=1.5)], ids=["greedy", "sample"])
def test_dividing_steps_among_calls_does_not_change_tokens(method: Greedy | Sample, chunk: int) -> None:
    whole, chunked = (decode(method, Limits(max_new_tokens=13), chunk=c) for c in (16, chunk))
    assert texts(whole) == texts(chunked)
    assert (whole.scores_BR == chunked.scores_BR).all()


def test_samples_do_not_depend_on_the_batch() -> None:
    """Not on the row, the other rows or the number of rows."""
    method, limits = Sample(temperature=1.5), Limits(max_new_tokens=12)
    together = texts(decode(method, limits))
    assert texts(decode(method, limits, PROMPTS[::-1])) == together[::-1]
    assert texts(decode(method, limits, rows=8)) == together
    for prompt, text in zip(PROMPTS, together, strict=True):
        assert texts(decode(method, limits, [prompt])) == [text]
    assert texts(decode(method, limits, seed=1)) != together
    assert len({tuple(t) for t in texts(decode(method, limits, [PROMPTS[0]] * 6, samples=list(range(6))))}) > 3


def test_sampled_first_tokens_have_the_models_frequencies() -> None:
    count = 4000
    found = decode(Sample(), Limits(max_new_tokens=2), [[5, 6]] * count, samples=list(range(count)))
    first, second = (np.array([t[i] if len(t) > i else -1 for t in texts(found)]) for i in (0, 1))
    for tokens, given in ((first, []), (second[first == first[0]], [int(first[0])])):
        expected = len(tokens) * np.exp(log_probs(MODEL, [5, 6], 0, given)[-1])
        observed = np.bincount(tokens, minlength=VOCAB)
        assert ((observed - expected) ** 2 / expected).sum() < (VOCAB - 1) + 4 * np.sqrt(2 * (VOCAB - 1))


def test_the_loop_ends_when_the_last_row_ends() -> None:
    """The state counts steps: none follows once all rows have ended, and empty rows do not delay the end."""
    limits = Limits(max_new_tokens=16)
    ending = [p for p in PROMPTS if len(greedily(p, limits)) < 16]
    assert ending
    weights, decoder = decoding_weights(MODEL, MODEL.params), Decoder(MODEL, Greedy(), (EOS,))
    seeds = Seeds(seed=0, prompts_B=np.zeros(8, np.uint32), samples_B=np.zeros(8, np.uint32))
    prompt = pad_prompts([np.array(p, np.int32) for p in ending], [0] * len(ending), rows=8)
    state = decoder.start(weights, prompt, seeds, np.arange(8) < len(ending), slots=SLOTS)
    state = decoder.advance(weights, state, limits)
    assert int(state.step) == max(len(greedily(p, limits)) for p in ending)
    assert not decoder.read(state).running_B.any()


def test_rows_can_be_stopped() -> None:
    limits = Limits(max_new_tokens=9)
    weights, decoder = decoding_weights(MODEL, MODEL.params), Decoder(MODEL, Greedy(), ())
    seeds = Seeds(seed=0, prompts_B=np.zeros(2, np.uint32), samples_B=np.zeros(2, np.uint32))
    prompt = pad_prompts([np.array(p, np.int32) for p in PROMPTS[:2]], [0, 0], rows=2)
    state = decoder.start(weights, prompt, seeds, np.ones(2, bool), slots=SLOTS)
    state = decoder.advance(weights, state, limits, until=4)
    seen = decoder.read(state)
    state = decoder.advance(weights, state, limits, stop_B=np.array([False, True]))
    found = decoder.read(state)
    assert found.lengths_BR.tolist() == [[9], [4]]
    assert not found.ended_BR.any()
    assert seen.lengths_BR.tolist() == [[4], [4]]  # earlier results are copies
    assert texts(found)[0] == greedily(PROMPTS[0], limits, ())


def test_one_program_for_all_limits() -> None:
    weights, decoder = decoding_weights(MODEL, MODEL.params), Decoder(MODEL, Greedy(), (EOS,))
    seeds = Seeds(seed=0, prompts_B=np.zeros(2, np.uint32), samples_B=np.zeros(2, np.uint32))
    for width in (3, 9):
        prompt = pad_prompts([np.arange(width, dtype=np.int32)] * 2, [0, 0], rows=2)
        for most, least in ((5, 0), (16, 3), (9, 9)):
            state = decoder.start(weights, prompt, seeds, np.ones(2, bool), slots=SLOTS)
            for until in (2, 7, most):
                state = decoder.advance(weights, state, Limits(max_new_tokens=most, min_new_tokens=least), until=until)
    assert decoder.programs() == (1, 1)


def test_buckets() -> None:
    sizes = sorted({bucket(n) for n in range(1, 3000)})
    assert all(b <= 1.5 * a for a, b in itertools.pairwise(sizes))
    assert all(bucket(n) >= n and bucket(bucket(n)) == bucket(n) for n in range(1, 3000))
    assert len(sizes) < 20


def test_sharded_rows_generate_the_same_tokens() -> None:
    """Eight devices, two rows each: the cache is sharded by rows."""
    prompts = [*PROMPTS, *([i] for i in range(11))]
    method, limits = Sample(temperature=1.2), Limits(max_new_tokens=10)
    expected = texts(decode(method, limits, prompts))
    mesh = make_mesh(MeshShape(data=8))
    with jax.set_mesh(mesh):
        assert texts(decode(method, limits, prompts)) == expected


@pytest.mark.parametrize("vocab", [7, 128, 256, 320])
def test_first_argmax_takes_the_lowest_id(vocab: int) -> None:
    logits = np.random.default_rng(0).integers(-3, 3, (200, vocab)).astype(np.float32)
    logits[0] = -np.inf
    logits[1, 4:] = np.inf
    assert first_argmax(jnp.asarray(logits)).tolist() == logits.argmax(axis=1).tolist()
