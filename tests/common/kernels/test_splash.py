"""Compares splash attention, interpreted on a CPU, with NumPy in float64 and the plain implementation's gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.kernels.splash import splash
from tests.common.kernels.cases import (
    SCALE,
    AttentionCase,
    Operands,
    check_no_leak,
    error,
    output_and_gradients,
    plain,
    reference,
)

unbiased = functools.partial(AttentionCase, bias=False)
CASES = {
    "bidirectional": unbiased(),
    "causal, blocks of 128": unbiased(causal=True, queries=250, keys=250, block=128, heads=1, groups=1),
    "grouped": unbiased(causal=True, heads=4, groups=2, head_dim=16),
    "cross": unbiased(queries=45, keys=130, head_dim=128, heads=1, groups=1),
    "after inputs": unbiased(causal=True, queries=70, keys=150, q_offset=80, block=128, rows=1),
    "keys that no query sees": unbiased(causal=True, queries=33, keys=300, block=128, heads=1, groups=1),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(case: AttentionCase, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
    block = max(case.block, 128)
    return splash(q, k, v, case.visibility(table), scale=SCALE, block=block, interpret=True)


@functools.cache
def computed(case: AttentionCase) -> tuple[jax.Array, dict[str, jax.Array]]:
    return output_and_gradients(run, case, case.operands())


@EVERY_CASE
def test_output_is_the_definition(case: AttentionCase) -> None:
    assert error(computed(case)[0], reference(case, *case.operands())) <= 1e-5


@EVERY_CASE
def test_gradients_are_those_of_the_plain_implementation(case: AttentionCase) -> None:
    gradients, expected = computed(case)[1], output_and_gradients(plain, case, case.operands())[1]
    assert {name: e for name in "qkv" if (e := error(gradients[name], expected[name])) > 1e-5} == {}


@EVERY_CASE
def test_padding_sees_nothing_and_is_not_seen(case: AttentionCase) -> None:
    """Output and gradients of segment 0 are exactly 0."""
    out, gradients = computed(case)
    seen = case.visibility(None)
    no_query, no_key = (np.asarray(x) == 0 for x in (seen.q_segments_BQ, seen.k_segments_BK))
    for x, padding in (
        (out, no_query),
        (gradients["q"], no_query),
        (gradients["k"].swapaxes(1, 2), no_key),
        (gradients["v"].swapaxes(1, 2), no_key),
    ):
        assert padding.any() and (np.asarray(x)[padding] == 0).all() and (np.asarray(x) != 0).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1.0, 1e30])
def test_a_query_without_keys_is_zero_with_zero_gradient(causal: bool, size: float) -> None:
    """There are keys, huge or not, but none of the query's segment."""
    case = AttentionCase(bias=False, causal=causal)

    def blind(case: AttentionCase, q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array) -> jax.Array:
        seen = case.visibility(table)
        seen = dataclasses.replace(seen, k_segments_BK=jnp.full_like(seen.k_segments_BK, 7))
        return splash(q, k * size, v, seen, scale=SCALE, block=128, interpret=True)

    out, gradients = output_and_gradients(blind, case, case.operands())
    assert all((np.asarray(x) == 0).all() for x in (out, *gradients.values()))


def test_a_huge_key_of_another_segment_changes_nothing() -> None:
    check_no_leak(run, CASES["bidirectional"])


def test_bfloat16_is_as_close_as_its_eight_bits_allow() -> None:
    """Within 1 % of the largest value, compared with float64 on the same rounded operands."""
    case = CASES["grouped"]
    operands: Operands = case.operands(jnp.bfloat16)
    out, gradients = output_and_gradients(run, case, operands)
    assert {x.dtype.name for x in (out, *(gradients[name] for name in "qkv"))} == {"bfloat16"}
    assert error(out, reference(case, *operands)) <= 1e-2
    exact: Operands = tuple(x.astype(jnp.float32) for x in operands)  # type: ignore[assignment]
    expected = output_and_gradients(plain, case, exact)[1]
    assert {name: e for name in "qkv" if (e := error(gradients[name], expected[name])) > 1e-2} == {}
