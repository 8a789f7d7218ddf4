"""Compares flash attention, interpreted on a CPU, with NumPy in float64 and the plain implementation's gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from common.kernels import flash as flash_module
from common.kernels.bias import relative_bucket
from common.kernels.flash import flash, segment_ranges
from common.kernels.flash_kernels import Blocks
from common.kernels.toeplitz import diagonal_sums, toeplitz_tile
from tests.common.kernels.cases import (
    SCALE,
    AttentionCase,
    check_no_leak,
    error,
    jit,
    output_and_gradients,
    plain,
    reference,
)

CASES = {
    "bidirectional": AttentionCase(),
    "causal": AttentionCase(causal=True),
    "causal, whole blocks, heads of 64": AttentionCase(causal=True, queries=128, keys=128, block=64, head_dim=64),
    "causal, no bias": AttentionCase(causal=True, bias=False),
    "prefix": AttentionCase(causal=True, prefix=45),
    "prefix and offset": AttentionCase(causal=True, prefix=60, queries=70, keys=110, q_offset=40),
    "last query": AttentionCase(causal=True, queries=1, keys=70, q_offset=69),
    "keys that no query sees": AttentionCase(causal=True, queries=33, keys=160),
    "cross, heads of 128": AttentionCase(queries=45, keys=130, bias=False, head_dim=128),
    "cross with a table": AttentionCase(queries=130, keys=45),
    "even tiles": AttentionCase(queries=211, keys=211, heads=2, groups=1),
    "even tiles, causal": AttentionCase(queries=211, keys=211, heads=2, groups=1, causal=True, head_dim=64),
    "grouped": AttentionCase(heads=6, groups=2, causal=True),
    "blocks of 128": AttentionCase(queries=250, keys=250, heads=1, groups=1, block=128, causal=True),
    "unequal blocks, a strip in two": AttentionCase(queries=120, keys=250, heads=1, groups=1, block=256),
}
SLOW_CASES = ("even tiles", "causal, whole blocks, heads of 64", "prefix", "cross, heads of 128", "blocks of 128")
"""Larger ones, and one that is part of another."""
EVERY_CASE = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name in SLOW_CASES else [])
        for name, case in CASES.items()
    ],
)


def run(case: AttentionCase, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
    return flash(q, k, v, case.visibility(table), scale=SCALE, block=(case.block, case.block), interpret=True)


@functools.cache
def computed(case: AttentionCase) -> tuple[jax.Array, dict[str, jax.Array]]:
    return output_and_gradients(run, case, case.operands())


@EVERY_CASE
def test_output_is_the_definition(case: AttentionCase) -> None:
    assert error(computed(case)[0], reference(case, *case.operands())) <= 1e-5


@EVERY_CASE
def test_gradients_are_those_of_the_plain_implementation(case: AttentionCase) -> None:
    gradients, expected = computed(case)[1], output_and_gradients(plain, case, case.operands())[1]
    assert {name: e for name in expected if (e := error(gradients[name], expected[name])) > 1e-5} == {}
    assert (np.asarray(gradients["table"]) != 0).any() == case.bias


@pytest.mark.parametrize("name", ["grouped", pytest.param("even tiles, causal", marks=pytest.mark.slow)])
def test_gradients_of_queries_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls whose queries do not fit in fast memory together; compared with the plain implementation."""
    case, calls = CASES[name], []
    of_one_block = case.block * case.heads // case.groups * case.head_dim * 4
    monkeypatch.setattr(flash_module, "QUERY_SUM_BYTES", 2 * of_one_block * 2)  # float32: half as many queries
    call = flash_module._call_backward
    monkeypatch.setattr(flash_module, "_call_backward", lambda *args: calls.append(args[0].queries) or call(*args))
    gradients = output_and_gradients(run, case, case.operands())[1]
    assert len(calls) > 1 and max(calls) == 2 * case.block
    expected = output_and_gradients(plain, case, case.operands())[1]
    assert {name: e for name in expected if (e := error(gradients[name], expected[name])) > 1e-5} == {}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["even tiles", "even tiles, causal", "prefix and offset"])
def test_even_tiles_have_no_mask_and_one_bias(name: str, bias: bool) -> None:
    """The kind of each tile, compared with the dense mask and bias."""
    case = dataclasses.replace(CASES[name], block=16, bias=bias)
    table = case.operands()[3]
    seen, size = case.visibility(table), case.block
    sizes = [-(-n // size) * size for n in (case.queries, case.keys)]
    blocks = Blocks(
        queries=sizes[0],
        keys=sizes[1],
        block_q=size,
        block_k=size,
        causal=case.causal,
        prefix_length=case.prefix,
        max_distance=seen.bias.max_distance if seen.bias else None,
        interpret=True,
    )
    padded = [
        np.pad(np.asarray(x), ((0, 0), (0, n - x.shape[1])))
        for x, n in zip((seen.q_segments_BQ, seen.k_segments_BK), sizes, strict=True)
    ]
    keys = np.where(padded[1] == 0, -1, padded[1])
    scalars = segment_ranges(blocks, jnp.array([case.q_offset]), jnp.array(padded[0]), jnp.array(keys))
    visible = dataclasses.replace(seen, q_segments_BQ=jnp.array(padded[0]), k_segments_BK=jnp.array(padded[1]))
    mask = np.asarray(visible.mask_BQK())
    distance = np.arange(sizes[1])[None] - np.arange(sizes[0])[:, None] - case.q_offset
    bucket = np.zeros_like(distance)
    if seen.bias:
        bucket = np.asarray(
            relative_bucket(jnp.array(distance), bidirectional=not case.causal, buckets=32, max_distance=48)
        )
    found = {"skip": 0, "even": 0, "mixed": 0}
    for row, i, j in np.ndindex(case.rows, blocks.q_blocks, blocks.k_blocks):
        any_seen, even = (bool(x) for x in blocks.kind(scalars, row, i, j))
        tile = np.s_[i * size : (i + 1) * size, j * size : (j + 1) * size]
        if not any_seen:
            assert not mask[row][tile].any()
        elif even:
            assert mask[row][tile].all() and np.ptp(bucket[tile]) == 0
        found["even" if any_seen and even else "mixed" if any_seen else "skip"] += 1
    assert all(found.values()) or (name == "prefix and offset" and bias and found["skip"])  # all of them are near


@pytest.mark.parametrize("name", ["bidirectional", "causal", "grouped"])
def test_gradients_are_those_of_float64(name: str) -> None:
    """Compared along random directions with central differences of the definition."""
    case, rng = CASES[name], np.random.default_rng(0)
    operands, gradients = case.operands(), computed(case)[1]
    weights = np.asarray(jax.random.normal(jax.random.key(6), operands[0].shape), np.float64)
    for at, key in enumerate(gradients):
        direction = rng.normal(size=operands[at].shape)

        def along(step: float, at: int = at, direction: np.ndarray = direction) -> float:
            moved = [np.asarray(x, np.float64) + (step * direction if n == at else 0) for n, x in enumerate(operands)]
            return float((reference(case, *moved) * weights).sum())

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        product = np.asarray(gradients[key], np.float64) * direction
        assert abs(product.sum() - slope) <= 1e-5 * np.sqrt((product**2).sum()), key


@pytest.mark.parametrize("name", [pytest.param("bidirectional", marks=pytest.mark.slow), "grouped"])
def test_bfloat16_is_as_close_as_its_eight_bits_allow(name: str) -> None:
    """Within 1 % of the largest value, compared with float64 on the same rounded operands."""
    case = CASES[name]
    q, k, v, table = case.operands(jnp.bfloat16)
    out, gradients = output_and_gradients(run, case, (q, k, v, table))
    assert [x.dtype.name for x in (out, *gradients.values())] == ["bfloat16"] * 4 + ["float32"]
    assert error(out, reference(case, q, k, v, table)) <= 1e-2
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    expected = output_and_gradients(plain, case, (q, k, v, table))[1]
    assert {name: e for name in expected if (e := error(gradients[name], expected[name])) > 1e-2} == {}


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_query_without_keys_is_zero_with_zero_gradient(causal: bool) -> None:
    case = AttentionCase(causal=causal)
    operands = case.operands()

    def blind(case: AttentionCase, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
        seen = case.visibility(table)
        seen = dataclasses.replace(seen, k_segments_BK=jnp.full_like(seen.k_segments_BK, 7))
        return flash(q, k, v, seen, scale=SCALE, block=(32, 32), interpret=True)

    out, gradients = output_and_gradients(blind, case, operands)
    assert all((np.asarray(x) == 0).all() for x in (out, *gradients.values()))


@pytest.mark.parametrize("name", ["bidirectional", "causal"])
def test_padding_sees_nothing_and_is_not_seen(name: str) -> None:
    """Output and gradients of segment 0 are exactly 0."""
    out, gradients = computed(CASES[name])
    padding = np.asarray(CASES[name].visibility(None).q_segments_BQ) == 0
    by_query = out, gradients["q"], gradients["k"].swapaxes(1, 2), gradients["v"].swapaxes(1, 2)
    of_padding = [np.asarray(x)[padding] for x in by_query]
    assert padding.any() and all((x == 0).all() for x in of_padding)
    assert (np.asarray(out)[~padding] != 0).all()


@pytest.mark.parametrize("name", [pytest.param("bidirectional", marks=pytest.mark.slow), "prefix"])
def test_a_huge_key_of_another_segment_changes_nothing(name: str) -> None:
    check_no_leak(run, CASES[name])


def test_causality_by_gradient() -> None:
    """The gradient of one query's output with respect to each value: not zero up to the query, zero after it."""
    case = AttentionCase(causal=True, rows=1, heads=1, groups=1)
    q, k, v, table = case.operands()
    at, begin = 65, case.queries // 6
    gradient = np.asarray(jit(jax.grad(lambda v: run(case, q, k, v, table)[0, at].sum()))(v))[0, 0]
    assert (gradient[begin : at + 1] != 0).all()
    assert (gradient[at + 1 :] == 0).all() and (gradient[:begin] == 0).all()


@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (32, 16), (16, 64), (128, 128), (128, 256), (256, 384)])
def test_toeplitz_tiles_and_diagonal_sums(queries: int, keys: int) -> None:
    """Both are exact on whole numbers, compared with NumPy's indexing."""
    vector = np.arange(1.0, queries + keys + 1, dtype=np.float32)
    c, r = np.indices((keys, queries))
    expanded = jit(toeplitz_tile, static_argnums=1)(jnp.array(vector)[None], keys)
    np.testing.assert_array_equal(expanded, vector[keys + r - c])
    tile = np.random.default_rng(0).integers(-9, 9, (keys, queries)).astype(np.float32)
    sums = np.zeros(queries + keys, np.float32)
    np.add.at(sums, keys + r - c, tile)
    np.testing.assert_array_equal(jit(diagonal_sums)(jnp.array(tile))[0], sums)


def test_no_array_is_as_large_as_queries_times_keys() -> None:
    """In the program for the gradients, apart from blocks inside kernels, the largest array is one of the operands."""
    case = AttentionCase(queries=1024, keys=1024, block=128, head_dim=32, rows=1)
    operands = case.operands()
    program = jax.make_jaxpr(jax.grad(lambda *x: run(case, *x).sum(), argnums=(0, 1, 2, 3)))(*operands)
    sizes: list[int] = []

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            sizes.extend(variable.aval.size for variable in equation.outvars)
            if equation.primitive.name != "pallas_call":
                for inner in jaxprs_in_params(equation.params):
                    walk(inner)

    walk(program.jaxpr)
    assert max(sizes) == operands[0].size < case.queries * case.keys


def test_no_keys_at_all() -> None:
    case = AttentionCase(keys=0, bias=False)
    q, k, v, table = case.operands()
    assert run(case, q, k, v, table).shape == q.shape
    assert (np.asarray(run(case, q, k, v, table)) == 0).all()
