"""Compares scores with the log-softmax of all logits, one example per row."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.data.batch import Batch
from common.errors import UserError
from common.infer.score import Pair, Score, continuation, pair, score, target_log_probs
from common.model import Skeleton, skeleton
from common.sharding.mesh import make_mesh
from common.sharding.rules import parameter_shardings
from common.sharding.shape import MeshShape
from experiments.families import ModelConfig, builder
from tests.helpers import EIGHT_DEVICES, F32, FAMILIES, MAX_POSITIONS, ONE_DEVICE, VOCAB, close, split

START = 3
LENGTHS = (16,)
WIDTH = 32

both_families = pytest.mark.parametrize("name", ["gpt-learned", "gpt-prefix", "t5like-bias"])


@functools.cache
def log_softmax(config: ModelConfig) -> Callable[[Any, Batch], jax.Array]:
    """Returns a program for the log-softmax of all logits, [B, T, V]; compiled once per model."""
    graphdef, _ = split(config)

    def full(params: Any, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return jax.nn.log_softmax(model.hidden(batch) @ model.head())

    return jax.jit(full)


def text(rng: np.random.Generator, most: int) -> list[int]:
    """Returns random ids, 0 included, of a random length from 0 to `most`."""
    return rng.integers(0, VOCAB, rng.integers(0, most + 1)).tolist()


def examples(count: int, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    made = [pair(text(rng, 16), text(rng, 16), start_id=START) for _ in range(count)]
    return [
        *made,
        pair([], [0, 0, 5], start_id=START),
        pair([0, 0], [0], start_id=0),
        pair([4, 5], [], start_id=START),
        pair([], [], start_id=START),
        continuation([7, 0, 8], [9, 10], start_id=START),
        continuation([7, 0, 8], [9, 10], start_id=None),
    ]


def scores(name: str, pairs: list[Pair], mesh_shape: MeshShape = ONE_DEVICE, **options: Any) -> list[Score]:
    model = skeleton(builder(FAMILIES[name], options.pop("execution", F32)))
    mesh = make_mesh(mesh_shape)
    params = jax.device_put(split(FAMILIES[name])[1], parameter_shardings(mesh, model.logical_axes))
    return score(model, params, mesh, pairs, **{"execution": F32, "rows": 4, "lengths": LENGTHS, **options})


def alone(config: ModelConfig, p: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Returns the log-softmax [T, V] at each target slot and the targets [T], from one example alone in a row."""
    inputs, targets = p.example.inputs_I.tolist(), p.example.targets_T.tolist()
    I, T = len(inputs), len(targets)  # noqa: E741 (a shape letter)

    def row(values: list[int], filler: int = 0) -> jax.Array:
        return jnp.array([[*values, *[filler] * (WIDTH - len(values))]], jnp.int32)

    batch = Batch(
        inputs_BI=row(inputs, 11),
        input_segments_BI=row([1] * I),
        input_positions_BI=row([*range(I)]),
        decoder_inputs_BT=row([p.start_id, *targets[:-1]], 12),
        targets_BT=row(targets, 13),
        target_segments_BT=row([1] * T),
        target_positions_BT=row([*range(I, I + T)]),
        weights_BT=jnp.ones((1, WIDTH)),
    )
    return np.asarray(log_softmax(config)(split(config)[1], batch))[0, :T], p.example.targets_T


@both_families
def test_scores_are_log_softmax_of_each_example_alone(name: str) -> None:
    pairs = [p for p in examples(4) if len(p.example.targets_T)]
    for p, found in zip(pairs, scores(name, pairs), strict=True):
        log_probs_TV, targets_T = alone(FAMILIES[name], p)
        expected_T = log_probs_TV[np.arange(len(targets_T)), targets_T]
        assert found.log_probs_T.dtype == np.float32
        np.testing.assert_allclose(found.log_probs_T, expected_T, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found.greedy_T, log_probs_TV.argmax(-1) == targets_T)
        chosen = p.example.weights_T > 0
        assert found.log_likelihood == pytest.approx(expected_T[chosen].sum(), rel=1e-5)
        assert found.is_greedy == found.greedy_T[chosen].all() and found.tokens == chosen.sum()


@pytest.mark.parametrize("name", ["gpt-prefix", "t5like-bias", pytest.param("gpt-learned", marks=pytest.mark.slow)])
def test_scores_do_not_depend_on_the_other_pairs(name: str) -> None:
    pairs = examples(40)
    together = scores(name, pairs)
    order = np.random.default_rng(1).permutation(len(pairs))
    shuffled = scores(name, [pairs[i] for i in order])
    few = scores(name, pairs[-12:], lengths=(8, 32) if name == "gpt-prefix" else LENGTHS)
    for other, indices in ((shuffled, order), (few, range(len(pairs) - 12, len(pairs)))):
        for found, i in zip(other, indices, strict=True):
            assert len(found.log_probs_T) == len(pairs[i].example.targets_T)
            np.testing.assert_allclose(found.log_probs_T, together[i].log_probs_T, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(found.greedy_T, together[i].greedy_T)


def test_packing_takes_fewer_rows_than_examples() -> None:
    """Short examples share rows, so fewer batches are needed."""
    batches = 0

    def advance(done: int) -> None:
        nonlocal batches
        batches += 1

    pairs = [pair([5] * 4, [6] * 4, start_id=START)] * 32
    scores("gpt-rope", pairs, lengths=(32,), rows=2, advance=advance)
    assert batches == 1 + 2, "one call for empty pairs, then 4 rows of 8 examples, 2 rows at a time"


def test_continuations_score_the_same_in_every_form() -> None:
    """For a causal decoder: the prompt in inputs or in targets, the first token given or taken from the context."""
    context, rest = [7, 0, 8, 5], [9, 10, 0]
    as_inputs, as_targets, native = scores(
        "gpt-rope",
        [
            pair(context[:-1], rest, start_id=context[-1]),
            continuation(context[1:], rest, start_id=context[0]),
            continuation(context, rest, start_id=None),
        ],
    )
    close(as_targets.log_probs_T[-3:], as_inputs.log_probs_T, 1e-5)
    close(native.log_probs_T, as_targets.log_probs_T, 1e-6)  # rows of one batch may round differently
    assert native.weights_T.tolist() == [0, 0, 0, 1, 1, 1]
    assert as_targets.log_likelihood == pytest.approx(as_inputs.log_likelihood, rel=1e-5)
    assert as_inputs.tokens == native.tokens == 3


def test_is_greedy_matches_greedy_decoding() -> None:
    """Targets of argmax tokens are greedy; changing one token makes them not greedy."""
    config, written = FAMILIES["gpt-rope"], []
    for _ in range(5):
        log_probs_TV, _ = alone(config, pair([5, 6], [*written, 0], start_id=START))
        written.append(int(log_probs_TV[-1].argmax()))
    other = [*written[:2], (written[2] + 1) % VOCAB, *written[3:]]
    greedy, not_greedy = scores("gpt-rope", [pair([5, 6], t, start_id=START) for t in (written, other)])
    assert greedy.is_greedy and greedy.greedy_T.all()
    assert not not_greedy.is_greedy and not_greedy.greedy_T[:3].tolist() == [True, True, False]


def test_progress_counts_every_example_once() -> None:
    pairs, done = examples(20), []
    scores("gpt-rope", pairs, advance=done.append)
    assert sum(done) == len(pairs)


def test_nothing_to_score() -> None:
    assert scores("gpt-rope", []) == []
    (found,) = scores("gpt-rope", [pair([4], [], start_id=START)])
    assert found.log_likelihood == 0.0 and found.tokens == 0 and found.log_probs_T.shape == (0,)


@pytest.mark.parametrize("name", ["gpt-rope", "t5like-bias"])
def test_scores_do_not_depend_on_the_mesh(name: str) -> None:
    pairs = examples(12)
    one = scores(name, pairs)
    for found, expected in zip(scores(name, pairs, mesh_shape=EIGHT_DEVICES), one, strict=True):
        np.testing.assert_allclose(found.log_probs_T, expected.log_probs_T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([([1], [1]), ([1] * 17, [1])], {}, r"pairs\[1\] has 17 input and 1 target tokens; the longest row has 16"),
        ([([], [1] * 17)], {}, r"pairs\[0\] has 0 input and 17 target tokens"),
        (
            [([1], [1])],
            {"rows": 3, "mesh_shape": MeshShape(data=2, fsdp=2)},
            "rows is 3, .* over 4 devices; nearest: 4",
        ),
    ],
)
def test_pairs_that_do_not_fit_raise(pairs: list, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scores("gpt-rope", [pair(*p, start_id=START) for p in pairs], **options)


def test_a_pair_may_take_all_positions_of_the_model_but_no_more() -> None:
    full = pair([5] * 16, [6] * (MAX_POSITIONS - 16), start_id=START)
    (found,) = scores("gpt-learned", [full], lengths=(64,))
    log_probs_TV, _ = alone(FAMILIES["gpt-learned"], full)
    np.testing.assert_allclose(found.log_probs_T, log_probs_TV[:, 6], rtol=1e-5, atol=1e-5)
    more = pair([5] * 16, [6] * (MAX_POSITIONS - 15), start_id=START)
    for name in ("gpt-learned", "t5like-learned"):
        with pytest.raises(UserError, match=rf"pairs\[0\] has 16 input and 33 .* has {MAX_POSITIONS} positions"):
            scores(name, [more], lengths=(64,))


def test_calls_share_compiled_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts traces: tracing a program merges the model with its parameters."""
    traced: list[Any] = []
    merge = Skeleton.merge
    monkeypatch.setattr(Skeleton, "merge", lambda self, params: traced.append(self) or merge(self, params))
    model, mesh = skeleton(builder(FAMILIES["gpt-rope"], F32)), make_mesh(ONE_DEVICE)
    params, pairs = split(FAMILIES["gpt-rope"])[1], [pair([4], [5, 6], start_id=START)]
    first, second = (
        score(model, params, mesh, pairs, execution=F32, rows=2, lengths=LENGTHS)[0].log_probs_T for _ in range(2)
    )
    assert traced == [model]
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("chunk", "unroll"),
    [
        *((chunk, False) for chunk in (1, 9, 12, 16, 33, 100)),
        *((chunk, True) for chunk in (9, 33)),
        *(pytest.param(chunk, True, marks=pytest.mark.slow) for chunk in (1, 12, 16, 100)),
    ],
)
def test_chunk_size_does_not_change_scores(chunk: int, unroll: bool) -> None:
    rng = np.random.default_rng(0)
    h_BTD, w_DV = (jnp.array(rng.normal(size=shape), jnp.float32) for shape in ((3, 11, 5), (5, 11)))
    targets_BT = jnp.array(rng.integers(0, 11, (3, 11)), jnp.int32)
    log_probs, greedy = target_log_probs(h_BTD, w_DV, targets_BT, chunk, unroll)
    full = jax.nn.log_softmax(h_BTD @ w_DV)
    np.testing.assert_allclose(log_probs, jnp.take_along_axis(full, targets_BT[..., None], -1)[..., 0], atol=1e-5)
    np.testing.assert_array_equal(greedy, full.argmax(-1) == targets_BT)


def test_large_logits_do_not_overflow() -> None:
    h_BTD, w_DV = jnp.full((1, 2, 1), 1e4), jnp.array([[1.0, -1.0, 1.0]])
    log_probs, greedy = target_log_probs(h_BTD, w_DV, jnp.array([[0, 2]], jnp.int32), 8, False)
    np.testing.assert_allclose(log_probs, [[-np.log(2), -np.log(2)]], atol=1e-3)
    assert greedy.tolist() == [[True, False]], "of equal logits the lowest id counts"


@pytest.mark.parametrize("unroll", [False, True])
def test_logits_never_exist_for_more_than_a_chunk(unroll: bool) -> None:
    B, T, D, V, chunk = 2, 64, 4, 50, 16
    arrays = jnp.zeros((B, T, D)), jnp.zeros((D, V)), jnp.zeros((B, T), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda h, w, t: target_log_probs(h, w, t, chunk, unroll))(*arrays)

    def sizes(jaxpr: Any) -> Any:
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    largest = max(sizes(jaxpr.jaxpr))
    assert chunk * V <= largest < 2 * chunk * V


def test_scanned_layers_and_chunked_heads_score_the_same() -> None:
    pairs = examples(6)
    scanned = dataclasses.replace(F32, scan_layers=True, loss_chunk=10)
    for a, b in zip(scores("t5like-bias", pairs), scores("t5like-bias", pairs, execution=scanned), strict=True):
        np.testing.assert_allclose(a.log_probs_T, b.log_probs_T, rtol=1e-5, atol=1e-5)
