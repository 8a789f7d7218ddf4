"""Flash attention, interpreted on a CPU, against NumPy in float64 and the gradients of the plain implementation."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from common.kernels.flash import flash
from common.kernels.toeplitz import diagonal_sums, toeplitz_tile
from tests.common.kernels.cases import SCALE, Case, check_strangers, error, jit, outcome, plain, reference

CASES = {
    "bidirectional": Case(),
    "causal": Case(causal=True),
    "causal, whole blocks, heads of 64": Case(causal=True, queries=128, keys=128, block=64, head_dim=64),
    "causal, no bias": Case(causal=True, bias=False),
    "prefix": Case(causal=True, prefix=45),
    "prefix and offset": Case(causal=True, prefix=60, queries=70, keys=110, q_offset=40),
    "last query": Case(causal=True, queries=1, keys=70, q_offset=69),
    "keys that none can reach": Case(causal=True, queries=33, keys=160),
    "cross, heads of 128": Case(queries=45, keys=130, bias=False, head_dim=128),
    "cross with a table": Case(queries=130, keys=45),
    "grouped": Case(heads=6, groups=2, causal=True),
    "blocks of 128": Case(queries=250, keys=250, heads=1, groups=1, block=128, causal=True),
    "unequal blocks, a strip in two": Case(queries=120, keys=250, heads=1, groups=1, block=256),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(case: Case, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
    return flash(q, k, v, case.visibility(table), scale=SCALE, block=case.block, interpret=True)


@functools.cache
def found(case: Case) -> tuple[jax.Array, dict[str, jax.Array]]:
    return outcome(run, case, case.operands())


@EVERY_CASE
def test_output_is_the_definition(case: Case) -> None:
    assert error(found(case)[0], reference(case, *case.operands())) <= 1e-5


@EVERY_CASE
def test_gradients_are_those_of_the_plain_implementation(case: Case) -> None:
    gradients, expected = found(case)[1], outcome(plain, case, case.operands())[1]
    assert {name: e for name in expected if (e := error(gradients[name], expected[name])) > 1e-5} == {}
    assert (np.asarray(gradients["table"]) != 0).any() == case.bias


@pytest.mark.parametrize("name", ["bidirectional", "causal", "grouped"])
def test_gradients_are_those_of_float64(name: str) -> None:
    """Along random directions, against central differences of the definition."""
    case, rng = CASES[name], np.random.default_rng(0)
    operands, gradients = case.operands(), found(case)[1]
    weights = np.asarray(jax.random.normal(jax.random.key(6), operands[0].shape), np.float64)
    for at, key in enumerate(gradients):
        direction = rng.normal(size=operands[at].shape)

        def along(step: float, at: int = at, direction: np.ndarray = direction) -> float:
            moved = [np.asarray(x, np.float64) + (step * direction if n == at else 0) for n, x in enumerate(operands)]
            return float((reference(case, *moved) * weights).sum())

        slope = (along(1e-5) - along(-1e-5)) / 2e-5
        product = np.asarray(gradients[key], np.float64) * direction
        assert abs(product.sum() - slope) <= 1e-5 * np.sqrt((product**2).sum()), key


@pytest.mark.parametrize("name", ["bidirectional", "grouped"])
def test_bfloat16_is_as_near_as_its_eight_bits_allow(name: str) -> None:
    """Within 1 % of the largest value of float64 on the same rounded operands: weights and outputs have 8 bits each."""
    case = CASES[name]
    q, k, v, table = case.operands(jnp.bfloat16)
    out, gradients = outcome(run, case, (q, k, v, table))
    assert [x.dtype.name for x in (out, *gradients.values())] == ["bfloat16"] * 4 + ["float32"]
    assert error(out, reference(case, q, k, v, table)) <= 1e-2
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    expected = outcome(plain, case, (q, k, v, table))[1]
    assert {name: e for name in expected if (e := error(gradients[name], expected[name])) > 1e-2} == {}


@pytest.mark.parametrize("causal", [False, True])
def test_a_query_that_sees_nothing_is_zero_with_zero_gradient(causal: bool) -> None:
    case = Case(causal=causal)
    operands = case.operands()

    def blind(case: Case, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
        seen = case.visibility(table)
        seen = dataclasses.replace(seen, k_segments_BK=jnp.full_like(seen.k_segments_BK, 7))
        return flash(q, k, v, seen, scale=SCALE, block=32, interpret=True)

    out, gradients = outcome(blind, case, operands)
    assert all((np.asarray(x) == 0).all() for x in (out, *gradients.values()))


@pytest.mark.parametrize("name", ["bidirectional", "causal"])
def test_padding_is_blind_and_unseen(name: str) -> None:
    """Exactly: segment 0 gives no output and takes no gradient, among rows that do."""
    out, gradients = found(CASES[name])
    padding = np.asarray(CASES[name].visibility(None).q_segments_BQ) == 0
    by_query = out, gradients["q"], gradients["k"].swapaxes(1, 2), gradients["v"].swapaxes(1, 2)
    of_padding = [np.asarray(x)[padding] for x in by_query]
    assert padding.any() and all((x == 0).all() for x in of_padding)
    assert (np.asarray(out)[~padding] != 0).all()


@pytest.mark.parametrize("name", ["bidirectional", "prefix"])
def test_a_huge_key_of_a_stranger_changes_nothing(name: str) -> None:
    check_strangers(run, CASES[name])


def test_causality_by_gradient() -> None:
    """Of every key in the output at one query: not zero up to the query, zero after it."""
    case = Case(causal=True, rows=1, heads=1, groups=1)
    q, k, v, table = case.operands()
    at, begin = 65, case.queries // 6
    gradient = np.asarray(jit(jax.grad(lambda v: run(case, q, k, v, table)[0, at].sum()))(v))[0, 0]
    assert (gradient[begin : at + 1] != 0).all()
    assert (gradient[at + 1 :] == 0).all() and (gradient[:begin] == 0).all()


@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (32, 16), (16, 64), (128, 128), (128, 256), (256, 384)])
def test_tiles_and_vectors(queries: int, keys: int) -> None:
    """A tile is the vector along its diagonals, and `diagonal_sums` sums each diagonal: exactly, on whole numbers."""
    vector = np.arange(1.0, queries + keys + 1, dtype=np.float32)
    c, r = np.indices((keys, queries))
    expanded = jit(toeplitz_tile, static_argnums=1)(jnp.array(vector)[None], keys)
    np.testing.assert_array_equal(expanded, vector[keys + r - c])
    tile = np.random.default_rng(0).integers(-9, 9, (keys, queries)).astype(np.float32)
    sums = np.zeros(queries + keys, np.float32)
    np.add.at(sums, keys + r - c, tile)
    np.testing.assert_array_equal(jit(diagonal_sums)(jnp.array(tile))[0], sums)


def test_nothing_as_large_as_queries_times_keys_is_made() -> None:
    """In the program of value and gradients, kernels' own blocks apart: the largest array is one of the operands."""
    case = Case(queries=1024, keys=1024, block=128, head_dim=32, rows=1)
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
    case = Case(keys=0, bias=False)
    q, k, v, table = case.operands()
    assert run(case, q, k, v, table).shape == q.shape
    assert (np.asarray(run(case, q, k, v, table)) == 0).all()
