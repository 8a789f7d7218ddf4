"""The choice among implementations, and what each keeps for the backward pass."""

import contextlib
import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from common.errors import UserError
from common.kernels.attention import attend
from common.kernels.choice import AttentionCall, Implementation, Kind, choose
from common.kernels.visibility import ATTENTION
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from tests.common.kernels import cases

WHOLE = AttentionCall(
    platform="tpu",
    dtype="bfloat16",
    head_dim=128,
    queries=512,
    biased=False,
    consecutive=True,
    prefix=False,
    static_index=True,
    one_segment=False,
    divides=True,
)


@pytest.mark.parametrize(
    ("change", "tpu", "gpu", "cpu"),
    [
        ({}, "splash", "blocked", "blocked"),
        ({"one_segment": True}, "splash", "cudnn", "blocked"),
        ({"one_segment": True, "head_dim": 64}, "flash", "cudnn", "blocked"),
        ({"one_segment": True, "dtype": "float32"}, "splash", "blocked", "blocked"),
        ({"one_segment": True, "head_dim": 20}, "flash", "blocked", "blocked"),
        ({"prefix": True, "one_segment": True}, "flash", "blocked", "blocked"),
        ({"biased": True}, "flash", "blocked", "blocked"),
        ({"biased": True, "consecutive": False}, "blocked", "blocked", "blocked"),
        ({"divides": False, "one_segment": True}, "blocked", "blocked", "blocked"),
        ({"queries": 1}, "plain", "plain", "plain"),
        ({"static_index": False}, "plain", "plain", "plain"),
    ],
    ids=str,
)
def test_auto(change: dict[str, Any], tpu: Kind, gpu: Kind, cpu: Kind) -> None:
    calls = (dataclasses.replace(WHOLE, **change, platform=name) for name in ("tpu", "gpu", "cpu"))
    assert [choose(Implementation(), call) for call in calls] == [tpu, gpu, cpu]


def test_the_named_implementation_is_chosen_if_it_serves() -> None:
    """Otherwise the choice is that of `auto`."""
    assert choose(Implementation(kind="flash"), WHOLE) == "flash"
    assert choose(Implementation(kind="splash"), dataclasses.replace(WHOLE, biased=True)) == "flash"
    assert all(choose(Implementation(kind=kind), WHOLE) == kind for kind in ("blocked", "plain"))
    assert choose(Implementation(kind="cudnn"), dataclasses.replace(WHOLE, platform="cuda")) == "blocked"
    with pytest.raises(UserError, match="attention is 'cudnn', which runs on gpu, but this program is for tpu"):
        choose(Implementation(kind="cudnn"), WHOLE)


def test_auto_on_a_cpu_is_blocked_bit_for_bit() -> None:
    case = cases.AttentionCase()
    q, k, v, table = case.operands()
    auto, blocked = (
        attend(q, k, v, case.visibility(table), scale=0.3, implementation=implementation)
        for implementation in (Implementation(), Implementation(kind="blocked", block=64))
    )
    assert (auto == blocked).all()


def counted(jaxpr: Any) -> Counter[str]:
    """How often each primitive, and each kernel by its name, is in a program; kernels' bodies do not count."""
    found: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        kernel = equation.primitive.name == "pallas_call"
        found[equation.params["name"] if kernel else equation.primitive.name] += 1
        for inner in () if kernel else jaxprs_in_params(equation.params):
            found += counted(inner)
    return found


@pytest.mark.parametrize(
    ("kind", "counts", "once"),
    [("splash", "splash_mha_fwd_segmented_residuals", 1), ("flash", "flash_forward", 1), ("blocked", "dot_general", 2)],
)
@pytest.mark.parametrize("mesh", [None, MeshShape(data=2, context=2, tensor=2)], ids=str)
def test_what_is_saved_by_name_is_not_recomputed(kind: Kind, counts: str, once: int, mesh: MeshShape | None) -> None:
    """A program that may save nothing has `once` more of what `counts` names: the forward pass runs again."""
    case = cases.AttentionCase(bias=kind == "flash", causal=True, rows=4)
    implementation = Implementation(kind=kind, block=128, kernel_block=128, interpret=True)

    def attention(*operands: jax.Array) -> jax.Array:
        q, k, v, table = operands
        # As in a layer, there are operations before and after attention.
        return jnp.sin(attend(jnp.sin(q), k, v, case.visibility(table), scale=0.3, implementation=implementation))

    def number(policy: Any) -> int:
        kept = jax.checkpoint(attention, policy=policy)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(make_mesh(mesh)):
            gradient = jax.make_jaxpr(jax.value_and_grad(lambda *x: kept(*x).sum(), argnums=(0, 1, 2)))
            program = gradient(*case.operands()).jaxpr
        used, _ = dce_jaxpr(program, [True] * len(program.outvars))
        return counted(used)[counts]

    policies = jax.checkpoint_policies
    by_name, everything, nothing = (
        number(policy)
        for policy in (
            policies.save_only_these_names(ATTENTION),
            policies.everything_saveable,
            policies.nothing_saveable,
        )
    )
    assert by_name == everything == nothing - once
