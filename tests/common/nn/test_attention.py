"""Attention against NumPy in float64, and with huge planted keys that must not leak."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.kernels import attention
from common.kernels.bias import BiasTable, relative_bucket
from common.kernels.choice import Implementation
from common.kernels.visibility import Visibility
from common.nn.attention import KeysValues, _drop_values
from common.nn.positions import rope

B, Q, K, H, G, C = 2, 6, 6, 4, 2, 8
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 0, 0]])


def inputs(seed: int = 0) -> tuple[jax.Array, KeysValues]:
    q, k, v = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(seed), 3), ((B, Q, H, C), (B, G, K, C), (B, G, K, C)), strict=True
        )
    )
    return q, KeysValues(k, v)


def attend(q: jax.Array, memory: KeysValues, seen: Visibility, *, scale: float, block: int | None) -> jax.Array:
    """Attends with `block` queries at a time, or with all logits at once if it is None."""
    implementation = Implementation(kind="plain") if block is None else Implementation(kind="blocked", block=block)
    return _attend(q, memory.k_BGKC, memory.v_BGKC, seen, scale=scale, implementation=implementation)


_attend = jax.jit(attention.attend, static_argnames=("scale", "implementation"))


def visibility(causal: bool = True, prefix: int = 0, bias: BiasTable | None = None) -> Visibility:
    positions = jnp.broadcast_to(jnp.arange(Q)[None], (B, Q))
    return Visibility(
        q_segments_BQ=SEGMENTS,
        k_segments_BK=SEGMENTS,
        q_positions_BQ=positions,
        k_positions_BK=positions,
        causal=causal,
        prefix_length=prefix,
        bias=bias,
    )


def reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, bias: np.ndarray, scale: float
) -> np.ndarray:
    """Computes attention from its definition, query by query, in float64."""
    out = np.zeros(q.shape, np.float64)
    for b, i, h in np.ndindex(B, Q, H):
        keys = np.flatnonzero(seen[b, i])
        if len(keys):
            logits = k[b, keys, h // (H // G)] @ q[b, i, h] * scale + bias[h, i, keys]
            weights = np.exp(logits - logits.max())
            out[b, i, h] = weights @ v[b, keys, h // (H // G)] / weights.sum()
    return out


SLOW = pytest.mark.slow
BLOCKS = pytest.mark.parametrize("block", [None, 2, 4, 64])


@pytest.mark.parametrize(
    ("causal", "prefix", "with_bias", "block"),
    [
        # Quick: every mask at once and in unequal blocks, and one mask in any blocks.
        pytest.param(
            causal, prefix, bias, block, marks=[] if block in (None, 4) or (causal and prefix and bias) else SLOW
        )
        for causal in (False, True)
        for prefix in (0, 3)
        for bias in (False, True)
        for block in (None, 2, 4, 64)
    ],
)
def test_attention_equals_its_definition(causal: bool, prefix: int, with_bias: bool, block: int | None) -> None:
    q, memory = inputs()
    table = BiasTable(
        table_HR=jax.random.normal(jax.random.key(5), (H, 32)), bidirectional=not causal, max_distance=128
    )
    out = attend(q, memory, visibility(causal, prefix, table if with_bias else None), scale=0.5, block=block)
    segments = np.asarray(SEGMENTS)
    seen = (segments[:, :, None] == segments[:, None]) & (segments[:, None] != 0)
    if causal:
        i, j = np.indices((Q, K))
        seen &= (j <= i) | ((i < prefix) & (j < prefix))
    bias = np.zeros((H, Q, K))
    if with_bias:
        distance = jnp.arange(K)[None, :] - jnp.arange(Q)[:, None]
        buckets = relative_bucket(distance, bidirectional=not causal, buckets=32, max_distance=128)
        bias = np.asarray(table.table_HR)[:, np.asarray(buckets)]
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, memory.k_BGKC.swapaxes(1, 2), memory.v_BGKC.swapaxes(1, 2)))
    np.testing.assert_allclose(out, reference(q64, k64, v64, seen, bias, 0.5), atol=2e-6)


@BLOCKS
def test_a_query_that_sees_no_key_returns_zero_with_zero_gradient(block: int | None) -> None:
    q, memory = inputs()
    blind = dataclasses.replace(visibility(), k_segments_BK=jnp.zeros_like(SEGMENTS))
    total, gradients = jax.value_and_grad(
        lambda q, m: attend(q, m, blind, scale=1.0, block=block).sum(), argnums=(0, 1)
    )(q, memory)
    assert float(total) == 0.0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradients))


@BLOCKS
@pytest.mark.parametrize("size", [1e4, 1e18])
def test_a_huge_key_of_another_segment_has_no_effect(size: float, block: int | None) -> None:
    q, memory = inputs()

    def output(planted: jax.Array) -> jax.Array:
        k = memory.k_BGKC.at[:, :, 0].set(planted)
        return attend(
            q, KeysValues(k, memory.v_BGKC.at[:, :, 0].set(planted)), visibility(False), scale=1.0, block=block
        )

    others = np.asarray(SEGMENTS) != 1
    planted = jnp.full((B, G, C), size)
    plain, changed = output(jnp.ones((B, G, C))), output(planted)
    assert (np.asarray(plain)[others] == np.asarray(changed)[others]).all()
    assert not np.allclose(np.asarray(plain)[~others], np.asarray(changed)[~others])
    gradient = jax.grad(lambda p: jnp.where(jnp.array(others)[..., None, None], output(p), 0).sum())(planted)
    assert (np.asarray(gradient) == 0).all()


@functools.cache
def gradients(causal: bool, block: int | None) -> tuple[jax.Array, ...]:
    """Returns gradients of queries, keys, values and bias table."""
    q, memory = inputs()
    table = jax.random.normal(jax.random.key(5), (H, 32))
    weights = jax.random.normal(jax.random.key(6), (B, Q, H, C))

    def total(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
        bias = BiasTable(table_HR=table, bidirectional=not causal, max_distance=128)
        out = attend(q, KeysValues(k, v), visibility(causal, 0, bias), scale=0.5, block=block)
        return (out * weights).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(q, memory.k_BGKC, memory.v_BGKC, table)


@pytest.mark.parametrize("block", [2, 4, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_the_same_in_blocks(causal: bool, block: int) -> None:
    """Compares gradients of queries, keys, values and bias table with automatic ones of the plain implementation."""
    for found, expected in zip(gradients(causal, block), gradients(causal, None), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_grouped_heads_equal_repeated_heads() -> None:
    q, memory = inputs()
    repeated = jax.tree.map(lambda x: jnp.repeat(x, H // G, axis=1), memory)
    grouped = attend(q, memory, visibility(), scale=1.0, block=None)
    np.testing.assert_allclose(grouped, attend(q, repeated, visibility(), scale=1.0, block=None), atol=1e-6)


def test_rope_depends_on_distance_only() -> None:
    x, y = (jax.random.normal(jax.random.key(i), (1, 1, 1, C)) for i in (0, 1))

    def score(at: int, other: int) -> float:
        a, b = (rope(z, jnp.array([[p]]), 10_000.0) for z, p in ((x, at), (y, other)))
        return float((a * b).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), rel=1e-2)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_equal_those_of_t5(bidirectional: bool) -> None:
    """Compares with T5's published rule (mesh_tensorflow), written here with Python integers and floats."""

    def bucket(distance: int) -> int:
        back, buckets, offset = -distance, 32, 0
        if bidirectional:
            buckets, offset = 16, 16 if back < 0 else 0
            back = abs(back)
        back = max(back, 0)
        exact = buckets // 2
        if back < exact:
            return offset + back
        eps = np.finfo(np.float32).eps
        log = np.log(np.float32(back) / np.float32(exact) + eps) / np.log(128 / exact) * (buckets - exact)
        return offset + min(buckets - 1, exact + int(log))

    distances = np.arange(-300, 301)
    found = relative_bucket(jnp.array(distances), bidirectional=bidirectional, buckets=32, max_distance=128)
    assert found.tolist() == [bucket(int(d)) for d in distances]
    assert len(set(found.tolist())) == (31 if bidirectional else 32)


@pytest.mark.parametrize("block", [None, 2])
def test_several_rows_of_queries_may_share_a_row_of_keys(block: int | None) -> None:
    """As beams share their memory; the result is that of repeated keys."""
    q, memory = inputs()
    times = 3
    many = jnp.concatenate([jnp.roll(q, i, axis=-1)[:, None] for i in range(times)], axis=1).reshape(-1, Q, H, C)
    seen = visibility(False)
    of_many = dataclasses.replace(
        seen,
        q_segments_BQ=jnp.repeat(seen.q_segments_BQ, times, axis=0),
        q_positions_BQ=jnp.repeat(seen.q_positions_BQ, times, axis=0),
    )
    repeated = dataclasses.replace(
        of_many,
        k_segments_BK=jnp.repeat(seen.k_segments_BK, times, axis=0),
        k_positions_BK=jnp.repeat(seen.k_positions_BK, times, axis=0),
    )
    by_copies = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), memory)
    np.testing.assert_allclose(
        attend(many, memory, of_many, scale=0.5, block=block),
        attend(many, by_copies, repeated, scale=0.5, block=block),
        atol=1e-6,
    )


@pytest.mark.parametrize("block", [None, 4])
def test_dropping_values_equals_dropping_weights_for_all_queries(block: int | None) -> None:
    """One-hot values reveal the weights; those of dropped keys become 0, the others are scaled by 1 / (1 - rate)."""
    q, memory = inputs()
    rate, seen = 0.4, visibility()
    v_BGKC = _drop_values(memory.v_BGKC, rate, jax.random.key(1))
    kept_BGK = np.asarray((v_BGKC != 0).all(axis=-1))
    assert (kept_BGK == (np.asarray(v_BGKC) != 0).any(axis=-1)).all() and 0 < kept_BGK.mean() < 1
    one_hot = jnp.broadcast_to(jnp.eye(K, C), memory.v_BGKC.shape)
    weights_BQHK = attend(q, KeysValues(memory.k_BGKC, one_hot), seen, scale=0.3, block=block)[..., :K]
    kept_BHK, v_BHKC = (np.repeat(x, H // G, axis=1) for x in (kept_BGK, np.asarray(memory.v_BGKC)))
    expected = np.einsum("bqhk,bhk,bhkc->bqhc", weights_BQHK, kept_BHK / (1 - rate), v_BHKC)
    found = attend(q, KeysValues(memory.k_BGKC, v_BGKC), seen, scale=0.3, block=block)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert _drop_values(memory.v_BGKC, rate, None) is memory.v_BGKC
    assert _drop_values(memory.v_BGKC, 0.0, jax.random.key(1)) is memory.v_BGKC
