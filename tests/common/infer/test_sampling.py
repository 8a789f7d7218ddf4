import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import UserError
from common.infer.config import Limits, Sample
from common.infer.sampling import draw, keep_top_k, keep_top_p, sample, sampling_weights

RNG = np.random.default_rng(0)
LOGITS_BV = (3 * RNG.normal(size=(6, 301))).astype(np.float32)


def by_sorting(logits_V: np.ndarray, method: Sample) -> np.ndarray:
    """Returns one row's sampling probabilities by sorting, float64; of equal ones the lower id comes first."""
    logits_V = logits_V.astype(np.float64) / method.temperature
    p_V = np.exp(logits_V - logits_V.max())
    order = np.argsort(-p_V, kind="stable")
    if method.top_k is not None:
        p_V[order[method.top_k :]] = 0
    p_V /= p_V.sum()
    if method.top_p < 1:
        before = np.cumsum(p_V[order]) - p_V[order]
        p_V[order[before >= method.top_p]] = 0
    return p_V / p_V.sum()


@pytest.mark.parametrize(
    "method",
    [
        Sample(),
        Sample(temperature=0.3),
        Sample(temperature=5.0, top_k=7),
        Sample(top_k=1),
        Sample(top_k=301),
        Sample(top_k=10_000),
        Sample(top_p=0.9),
        Sample(top_p=1e-6),
        Sample(top_p=0.999),
        Sample(temperature=0.7, top_k=40, top_p=0.8),
        Sample(temperature=1.5, top_k=3, top_p=0.5),
    ],
    ids=str,
)
def test_distribution_equals_the_one_by_sorting(method: Sample) -> None:
    found_BV = np.asarray(jax.jit(lambda x: sampling_weights(x, method))(LOGITS_BV), np.float64)
    found_BV /= found_BV.sum(axis=1, keepdims=True)
    expected_BV = np.array([by_sorting(row, method) for row in LOGITS_BV])
    assert ((found_BV > 0) == (expected_BV > 0)).all()
    np.testing.assert_allclose(found_BV, expected_BV, rtol=2e-5)


def test_ties_at_the_border_keep_the_lowest_ids() -> None:
    weights = jnp.array([[1.0, 4.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    kept = np.asarray(keep_top_k(weights, 3))
    assert kept.tolist() == [[1, 4, 1, 0, 0], [2, 2, 2, 0, 0], [0, 1, 0, 0, 0]]
    kept = np.asarray(keep_top_p(weights, 0.6))
    assert kept.tolist() == [[1, 4, 0, 0, 0], [2, 2, 2, 0, 0], [0, 1, 0, 0, 0]]


def test_top_p_keeps_the_smallest_set_with_the_mass() -> None:
    """A mass of exactly p is enough, and at least one token is kept."""
    halves = jnp.array([[0.25, 0.5, 0.125, 0.125]])
    for p, kept in [(0.5, [1]), (0.501, [0, 1]), (0.75, [0, 1]), (0.76, [0, 1, 2]), (1e-9, [1])]:
        assert np.flatnonzero(np.asarray(keep_top_p(halves, p))[0]).tolist() == kept


@pytest.mark.parametrize("method", [Sample(), Sample(temperature=0.8, top_k=5, top_p=0.9)], ids=str)
def test_sampled_frequencies(method: Sample) -> None:
    """Chi-square over 20,000 draws of independent keys."""
    logits_V = LOGITS_BV[0, :12]
    count = 20_000
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(count))
    tokens = np.asarray(jax.jit(lambda x, keys: sample(x, keys, method))(np.tile(logits_V, (count, 1)), keys))
    expected = count * by_sorting(logits_V, method)
    observed = np.bincount(tokens, minlength=12)
    possible = expected > 0
    assert (observed[~possible] == 0).all()
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_draw_inverts_the_distribution_function() -> None:
    weights_V = np.array([0.0, 0.1, 0.0, 0.4, 0.5, 0.0], np.float32)
    uniform = np.array([0.0, 0.05, 0.0999, 0.1001, 0.49, 0.5001, 1 - 2**-24], np.float32)
    found = draw(jnp.tile(weights_V, (len(uniform), 1)), jnp.asarray(uniform))
    assert found.tolist() == [1, 1, 1, 3, 3, 4, 4]


def test_low_temperature_is_greedy() -> None:
    keys = jax.random.split(jax.random.key(0), len(LOGITS_BV))
    for temperature in (1e-2, 1e-6, 1e-30):
        found = sample(jnp.asarray(LOGITS_BV), keys, Sample(temperature=temperature))
        assert found.tolist() == LOGITS_BV.argmax(axis=1).tolist()


def test_impossible_tokens_are_never_drawn() -> None:
    logits = jnp.full((1000, 5), -jnp.inf).at[:, 2:4].set(0.0)
    keys = jax.random.split(jax.random.key(0), 1000)
    assert set(sample(logits, keys, Sample()).tolist()) == {2, 3}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sample(temperature=0.0), "1e-30 or more"),
        (lambda: Sample(top_k=0), "1 or more"),
        (lambda: Sample(top_p=0.0), "more than 0"),
        (lambda: Sample(top_p=1.5), "at most 1"),
        (lambda: Limits(max_new_tokens=4, min_new_tokens=5), "at most max_new_tokens"),
        (lambda: Limits(stop=("",)), "empty"),
    ],
)
def test_mistakes(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        make()
