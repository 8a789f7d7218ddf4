"""Compares decoding with a cache to both families' training path, which has no cache."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from common.infer.beam import BeamDecoder
from common.infer.config import Beam, Greedy, Limits, Method, Sample
from common.infer.decode import Decoded, Decoder, Seeds, decoding_weights
from common.infer.prompt import pad_prompts
from common.model import skeleton
from common.nn.stack import PerLayer
from common.recipe import Execution
from common.sharding.mesh import make_mesh
from common.sharding.rules import parameter_shardings
from common.sharding.shape import MeshShape
from experiments.families import ModelConfig, builder
from tests.helpers import F32, FAMILIES, families, fresh, rows_of

PROMPTS = [[5, 6, 0, 7, 1], [], [11, 12], [0, 0, 3, 4, 90, 17, 23]]
SLOTS, SOURCE = 8, 16
SCAN = dataclasses.replace(F32, scan_layers=True)

SIBLINGS = ("gpt-rope", "t5like-bias", "t5like-relaxed")
siblings = pytest.mark.parametrize("config", [FAMILIES[name] for name in SIBLINGS], ids=SIBLINGS)
one_of_each = pytest.mark.parametrize(
    "config",
    [
        pytest.param(FAMILIES[name], id=name, marks=[pytest.mark.slow] if name == "t5like-relaxed" else [])
        for name in SIBLINGS
    ],
)


@functools.cache
def decoder_of(config: ModelConfig, method: Method, eos_ids: tuple[int, ...], execution: Execution) -> Any:
    """Returns a model and its decoder; cached, so programs are compiled once."""
    model = skeleton(builder(config, execution))
    return model, (BeamDecoder if isinstance(method, Beam) else Decoder)(model, method, eos_ids)  # type: ignore[arg-type]


def decode(
    config: ModelConfig,
    method: Method,
    limits: Limits,
    *,
    eos_ids: tuple[int, ...] = (),
    prompts: list[list[int]] = PROMPTS,
    starts: list[int] | None = None,
    execution: Execution = F32,
    params: Any = None,
    written: list[list[int]] | None = None,
) -> tuple[Decoded, Any]:
    """Returns the texts and the final cache."""
    model, decoder = decoder_of(config, method, eos_ids, execution)
    rows = len(prompts)
    weights = decoding_weights(model, fresh(config)[1] if params is None else params)
    prompt = pad_prompts([np.array(p, np.int32) for p in prompts], starts or [0] * rows, rows=rows, written=written)
    seeds = Seeds(seed=0, prompts_B=np.arange(rows, dtype=np.uint32), samples_B=np.zeros(rows, np.uint32))
    state = decoder.start(weights, prompt, seeds, np.ones(rows, bool), slots=SLOTS)
    state = decoder.advance(weights, state, limits)
    return decoder.read(state), state.cache


def made(found: Decoded, place: int = 0) -> list[list[int]]:
    lengths = found.lengths_BR[:, place]
    return [row[place, :n].tolist() for row, n in zip(found.tokens_BRT, lengths, strict=True)]


@functools.cache
def forward(config: ModelConfig) -> Callable[[Any], jax.Array]:
    graphdef, params = fresh(config)

    @jax.jit
    def log_probs(params: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return jax.nn.log_softmax(model.hidden(batch) @ model.head())

    return lambda batch: log_probs(params, batch)


def teacher_forced(config: ModelConfig, prompts: list[list[int]], texts: list[list[int]]) -> np.ndarray:
    """log-probabilities [rows, SLOTS, V] on the training path: one example per row, targets after start token 0."""
    rows = rows_of([[(prompt, text)] for prompt, text in zip(prompts, texts, strict=True)], SOURCE, SLOTS)
    return np.asarray(forward(config)(rows))


@families
def test_greedy_is_argmax_of_the_training_path(config: ModelConfig) -> None:
    found, _ = decode(config, Greedy(), Limits(max_new_tokens=SLOTS))
    texts = made(found)
    expected = teacher_forced(config, PROMPTS, texts)
    assert np.argmax(expected, axis=-1).tolist() == texts
    at = np.take_along_axis(expected, np.array(texts)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.log_probs_BRT[:, 0], at, atol=2e-5)
    assert len({tuple(text) for text in texts}) > 1  # a model with one answer would prove nothing


@one_of_each
def test_ends_and_limits(config: ModelConfig) -> None:
    """With several end tokens, a minimum length and a maximum length."""
    free = made(decode(config, Greedy(), Limits(max_new_tokens=SLOTS))[0])
    eos_ids = (free[0][2], free[3][0])
    for limits in (Limits(max_new_tokens=SLOTS), Limits(max_new_tokens=6, min_new_tokens=4)):
        found, _ = decode(config, Greedy(), limits, eos_ids=eos_ids)
        for row, text in enumerate(made(found)):
            scores = teacher_forced(config, PROMPTS, made(found))[row].copy()
            scores[: limits.min_new_tokens, list(eos_ids)] = -np.inf
            assert np.argmax(scores, axis=-1)[: len(text)].tolist() == text
            ends = [i for i, token in enumerate(text) if token in eos_ids]
            assert ends in ([], [len(text) - 1])
            assert len(text) == limits.max_new_tokens or ends
            assert not ends or len(text) > limits.min_new_tokens


@one_of_each
def test_scanned_layers_generate_the_same_tokens(config: ModelConfig) -> None:
    method = Sample(temperature=1.0)
    unrolled, cache = decode(config, method, Limits(max_new_tokens=SLOTS))
    scanned, stacked = decode(config, method, Limits(max_new_tokens=SLOTS), execution=SCAN)
    assert made(unrolled) == made(scanned)
    assert isinstance(cache.layers, PerLayer)
    assert not isinstance(stacked.layers, PerLayer)


@pytest.mark.parametrize(
    ("name", "method", "execution"),
    [
        ("gpt-rope", Greedy(), F32),
        ("t5like-bias", Sample(), SCAN),
        pytest.param("t5like-relaxed", Beam(size=2), F32, marks=pytest.mark.slow),
        ("t5like-bias", Beam(size=2), F32),
    ],
    ids=["gpt-greedy", "t5like-sampled-scanned", "t5like-relaxed-beams", "t5like-beams"],
)
def test_growing_the_room_does_not_change_texts(
    name: str, method: Method, execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAMILIES[name]
    expected, cache = decode(config, method, Limits(max_new_tokens=SLOTS), execution=execution)
    for module in ("decode", "beam"):
        monkeypatch.setattr(f"common.infer.{module}.FIRST_ROOM", 2)
    monkeypatch.setattr("tests.common.infer.test_models.decoder_of", decoder_of.__wrapped__)
    found, grown = decode(config, method, Limits(max_new_tokens=SLOTS), execution=execution)
    assert made(found) == made(expected)
    np.testing.assert_allclose(found.log_probs_BRT, expected.log_probs_BRT, atol=1e-6)
    assert jax.tree.map(np.shape, grown) == jax.tree.map(np.shape, cache)
    short, small = decode(config, method, Limits(max_new_tokens=3), execution=execution)
    assert made(short)[0] == made(expected)[0][:3] or isinstance(method, Beam)
    assert small.segments_BS.shape[1] == grown.segments_BS.shape[1] - SLOTS + 4, "room for 2, then for 4"


@siblings
def test_beam_scores_equal_the_training_path(config: ModelConfig) -> None:
    """Caches follow their beams, and beams share the memory of their prompt."""
    size, limits = 3, Limits(max_new_tokens=5)
    free = made(decode(config, Greedy(), limits)[0])
    found, cache = decode(config, Beam(size=size), limits, eos_ids=(free[0][1],))
    for place in range(size):
        texts = made(found, place)
        expected = teacher_forced(config, PROMPTS, texts)
        for row, text in enumerate(texts):
            at = expected[row, np.arange(len(text)), text]
            np.testing.assert_allclose(found.log_probs_BRT[row, place, : len(text)], at, atol=5e-5)
    if cache.memory is not None:
        assert {x.shape[0] for x in jax.tree.leaves(cache.memory)} == {len(PROMPTS)}
    assert {x.shape[0] for x in jax.tree.leaves(cache.layers)} == {len(PROMPTS) * size}


@pytest.mark.parametrize(
    "name", ["gpt-rope", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt-bias", "gpt-learned"))]
)
def test_native_alignment_continues_without_a_start_token(name: str) -> None:
    """The last token of the prompt is the first decoder input; prompt and answer are one text."""
    config = FAMILIES[name]
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14]]
    found, _ = decode(
        config,
        Greedy(),
        Limits(max_new_tokens=4),
        prompts=[p[:-1] for p in prompts],
        starts=[p[-1] for p in prompts],
    )
    for prompt, text in zip(prompts, made(found), strict=True):
        # The text as targets of an empty input, with its first token as the start token.
        whole = [*prompt, *text]
        rows = rows_of([[([], whole[1:])]], SOURCE, SLOTS)
        rows = dataclasses.replace(rows, decoder_inputs_BT=rows.decoder_inputs_BT.at[0, 0].set(whole[0]))
        assert (
            np.argmax(np.asarray(forward(config)(rows))[0], axis=-1)[len(prompt) - 1 : len(whole) - 1].tolist() == text
        )


@pytest.mark.parametrize(
    ("name", "method", "at_once"),
    [
        ("gpt-prefix", Greedy(), 4),
        ("t5like-bias", Greedy(), 128),
        ("t5like-relaxed", Beam(size=2), 128),
    ],
    ids=["gpt-prefix-in-pieces", "t5like-bias", "t5like-relaxed-beams"],
)
def test_a_prompt_in_the_targets_is_continued(
    name: str, method: Method, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A language model's prompt follows the start token; other rows have none, or have inputs too."""
    config = FAMILIES[name]
    monkeypatch.setattr("common.infer.decode.READ_AT_ONCE", at_once)
    monkeypatch.setattr("tests.common.infer.test_models.decoder_of", decoder_of.__wrapped__)
    inputs: list[list[int]] = [[], [], [], [5, 6]]
    begun = [[5, 6, 0, 7, 1], [], [11], [12, 90, 3]]
    before = [[0, *text] for text in begun]
    limits = Limits(max_new_tokens=3)
    starts, written = [row[-1] for row in before], [row[:-1] for row in before]
    found, _ = decode(config, method, limits, prompts=inputs, starts=starts, written=written)
    texts = made(found)
    whole = [[*a, *b] for a, b in zip(begun, texts, strict=True)]
    log_probs = teacher_forced(config, inputs, whole)
    for row, text in enumerate(texts):
        own = log_probs[row, len(begun[row]) : len(whole[row])]
        if isinstance(method, Greedy):
            assert own.argmax(axis=-1).tolist() == text
        np.testing.assert_allclose(found.log_probs_BRT[row, 0, :3], own[np.arange(3), text], atol=2e-5)
    assert len({tuple(text) for text in texts}) > 1


ROWS_AND_HEADS, AND_LENGTH = MeshShape(fsdp=2, tensor=2), MeshShape(fsdp=2, context=2, tensor=2)


@pytest.mark.parametrize(
    ("name", "method", "shape"),
    [
        ("gpt-rope", Greedy(), ROWS_AND_HEADS),
        ("t5like-relaxed", Greedy(), AND_LENGTH),
        ("t5like-bias", Beam(size=2), ROWS_AND_HEADS),
        pytest.param("gpt-rope", Beam(size=2), AND_LENGTH, marks=pytest.mark.slow),
        pytest.param("t5like-bias", Greedy(), AND_LENGTH, marks=pytest.mark.slow),
        pytest.param("t5like-relaxed", Beam(size=2), ROWS_AND_HEADS, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_cache_generates_the_same_tokens(name: str, method: Method, shape: MeshShape) -> None:
    """Rows along the mesh axes of rows, heads along `tensor`; one token has no length to divide along `context`."""
    config, limits = FAMILIES[name], Limits(max_new_tokens=5)
    expected, _ = decode(config, method, limits)
    mesh, (model, _) = make_mesh(shape), decoder_of(config, method, (), F32)
    params = jax.device_put(fresh(config)[1], parameter_shardings(mesh, model.logical_axes))
    with jax.set_mesh(mesh):
        found, cache = decode(config, method, limits, params=params)
    assert made(found) == made(expected)
    for x in jax.tree.leaves(cache.layers):
        assert x.sharding.shard_shape(x.shape)[:2] == (x.shape[0] // shape.row_parts, x.shape[1] // 2)
