"""Checks the bytes that programs send, counted in their text, against closed forms on eight CPU devices."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.compute.collectives import (
    Collective,
    as_compiled,
    axes_of,
    collectives,
    groups_of,
    scattered_bytes,
    summed_gather_bytes,
)
from common.compute.hlo import parse

SIZES = {"data": 2, "fsdp": 4}


def mesh() -> Mesh:
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 2)


def collectives_in(function: Callable[..., Any], *shapes_and_specs: tuple[tuple[int, ...], P]) -> list[Collective]:
    """The collectives of `function` compiled for float32 arguments."""
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh(), spec))
        for shape, spec in shapes_and_specs
    ]
    with jax.set_mesh(mesh()):
        text = jax.jit(function).lower(*arguments).compile().as_text()
    return collectives(parse(text), SIZES)


def gather(w: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(w, NamedSharding(mesh(), P()))


def test_a_sharded_matrix_is_gathered_once() -> None:
    found = collectives_in(lambda x, w: x @ gather(w), ((64, 32), P(("data", "fsdp"))), ((32, 48), P("fsdp")))
    assert found == [Collective(kind="all-gather", axes=("fsdp",), group=4, times=1, bytes=32 * 48 * 4)]
    assert found[0].sent_bytes == 32 * 48 * 4 * 3 / 4


@pytest.mark.parametrize("layers", [1, 3, 11])
def test_a_loop_gathers_in_every_iteration(layers: int) -> None:
    def stack(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ gather(w)), None), x, ws)[0]

    found = collectives_in(stack, ((64, 32), P("data")), ((layers, 32, 32), P(None, "fsdp")))
    gathers = [one for one in found if one.kind == "all-gather" and one.axes == ("fsdp",)]
    assert sum(one.bytes for one in gathers) == layers * 32 * 32 * 4


@pytest.mark.parametrize(
    ("body", "kind", "share"),
    [
        (lambda x, axes: jax.lax.psum(x, axes), "all-reduce", lambda n: 2 * (n - 1) / n),
        (lambda x, axes: jax.lax.psum_scatter(x, axes, tiled=True), "reduce-scatter", lambda n: (n - 1) / n),
        (lambda x, axes: jax.lax.all_gather(x, axes, tiled=True), "all-gather", lambda n: n - 1),
        (lambda x, axes: jax.lax.all_to_all(x, axes, 0, 1, tiled=True), "all-to-all", lambda n: (n - 1) / n),
    ],
    ids=["sum", "scatter", "gather", "exchange"],
)
@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("data", "fsdp")])
def test_each_kind_along_each_axis(
    body: Callable[..., Any], kind: str, share: Callable[[int], float], axes: tuple[str, ...]
) -> None:
    """`share` of n is what one device sends in a ring of n, relative to the array that it passes in."""
    whole = jax.shard_map(lambda x: body(x, axes), mesh=mesh(), in_specs=P(), out_specs=P(), check_vma=False)
    found = collectives_in(whole, ((16, 8), P()))
    n = math.prod(SIZES[axis] for axis in axes)
    assert [(one.kind, one.axes, one.group, one.times) for one in found] == [(kind, axes, n, 1)]
    assert found[0].sent_bytes == pytest.approx(16 * 8 * 4 * share(n))


def test_a_permutation_sends_the_whole_array() -> None:
    def shift(x: jax.Array) -> jax.Array:
        return jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])

    whole = jax.shard_map(shift, mesh=mesh(), in_specs=P(), out_specs=P(), check_vma=False)
    (found,) = collectives_in(whole, ((16, 8), P()))
    assert (found.kind, found.axes, found.sent_bytes) == ("collective-permute", ("fsdp",), 16 * 8 * 4)


SLICED = """
ENTRY %main (x: f32[64,8]) -> f32[16,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %place = s32[] constant(0)
  %sum = f32[64,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=GROUPS, to_apply=%add
  ROOT %own = f32[ROWS,8]{1,0} dynamic-slice(%sum, %place, %place), dynamic_slice_sizes={ROWS,8}
}
"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",)),
        ("[2,4]<=[8]", ("fsdp",)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp",)),
        ("mesh['axis_0'=8] {'axis_0':(2)4}", ("fsdp",)),
        ("[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
    ],
)
@pytest.mark.parametrize(("rows", "kind"), [(16, "reduce-scatter"), (32, "all-reduce")])
def test_an_all_reduce_that_is_sliced_is_a_reduce_scatter(
    groups: str, axes: tuple[str, ...], rows: int, kind: str
) -> None:
    program = parse(SLICED.replace("GROUPS", groups).replace("ROWS", str(rows)))
    (found,) = collectives(program, SIZES)
    assert (found.kind, found.axes, found.bytes) == (kind, axes, 64 * 8 * 4)


CALLED = """
%inside (x: f32[64,8]) -> (f32[64,8], f32[64,8]) {
  %x = f32[64,8]{1,0} parameter(0)
  %sum = f32[64,8]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %both = (f32[64,8]{1,0}, f32[64,8]{1,0}) tuple(%x, %sum)
}

ENTRY %main (x: f32[64,8]) -> (f32[16,8], f32[64,8]) {
  %x = f32[64,8]{1,0} parameter(0)
  %place = s32[] constant(0)
  %call = (f32[64,8]{1,0}, f32[64,8]{1,0}) call(%x), to_apply=%inside
  %same = f32[64,8]{1,0} get-tuple-element(%call), index=SAME
  %sum = f32[64,8]{1,0} get-tuple-element(%call), index=SUM
  %own = f32[16,8]{1,0} dynamic-slice(%sum, %place, %place), dynamic_slice_sizes={16,8}
  ROOT %out = (f32[16,8]{1,0}, f32[64,8]{1,0}) tuple(%own, %same)
}
"""


@pytest.mark.parametrize(("same", "sum_", "kind"), [(0, 1, "reduce-scatter"), (1, 0, "all-reduce")])
def test_the_slice_may_be_outside_of_the_call_that_reduces(same: int, sum_: int, kind: str) -> None:
    """`shard_map` compiles to such calls for sums of gradients."""
    (found,) = collectives(parse(CALLED.replace("SAME", str(same)).replace("SUM", str(sum_))), SIZES)
    assert (found.kind, found.bytes) == (kind, 64 * 8 * 4)


FUSED = """
%all-reduce-scatter.1 (p: bf16[64,8]) -> bf16[16,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  %sum = bf16[64,8]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = bf16[16,8]{1,0} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={16,8}
}

ENTRY %main (x: bf16[64,8], y: bf16[64,8]) -> bf16[16,8] {
  %x = bf16[64,8]{1,0} parameter(0)
  %y = bf16[64,8]{1,0} parameter(1)
  %whole = bf16[64,8]{1,0} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %fusion = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_the_compiler_scatters_one_of_two_gradients() -> None:
    assert scattered_bytes(parse(FUSED)) == 64 * 8 * 2
    requested = [Collective(kind="reduce-scatter", axes=("fsdp",), group=4, times=2, bytes=2 * 64 * 8 * 2)]
    compiled = as_compiled(requested, 64 * 8 * 2, 0)
    assert [(one.kind, one.bytes) for one in compiled] == [("reduce-scatter", 1024), ("all-reduce", 1024)]
    assert sum(one.sent_bytes for one in compiled) == 1.5 * requested[0].sent_bytes


SUMMED = """
%placed (p: bf16[16,8]) -> bf16[64,8] {
  %p = bf16[16,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %nothing = bf16[] constant(0)
  %zeros = bf16[64,8]{1,0} broadcast(%nothing), dimensions={}
  ROOT %own = bf16[64,8]{1,0} dynamic-update-slice(%zeros, %p, %zero, %zero)
}

%doubled (p: bf16[64,8]) -> bf16[64,8] {
  %p = bf16[64,8]{1,0} parameter(0)
  ROOT %twice = bf16[64,8]{1,0} add(%p, %p)
}

ENTRY %main (x: bf16[16,8], y: bf16[64,8]) -> (bf16[64,8], bf16[64,8], bf16[64,8]) {
  %x = bf16[16,8]{1,0} parameter(0)
  %y = bf16[64,8]{1,0} parameter(1)
  %own = bf16[64,8]{1,0} fusion(%x), kind=kLoop, calls=%placed
  %term = bf16[64,8]{1,0} fusion(%y), kind=kLoop, calls=%doubled
  %gather = bf16[64,8]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}
  %sums = (bf16[64,8]{1,0}, bf16[64,8]{1,0}) all-reduce(%own, %term), replica_groups={{0,1,2,3}}, to_apply=%add
  %first = bf16[64,8]{1,0} get-tuple-element(%sums), index=0
  %second = bf16[64,8]{1,0} get-tuple-element(%sums), index=1
  ROOT %all = (bf16[64,8]{1,0}, bf16[64,8]{1,0}, bf16[64,8]{1,0}) tuple(%gather, %first, %second)
}
"""


def test_the_compiler_gathers_one_of_two_weights_by_an_all_reduce() -> None:
    """A sum of terms that devices computed is no gather."""
    assert summed_gather_bytes(parse(SUMMED)) == 64 * 8 * 2
    requested = [Collective(kind="all-gather", axes=("fsdp",), group=4, times=2, bytes=2 * 64 * 8 * 2)]
    compiled = as_compiled(requested, 0, 64 * 8 * 2)
    assert [(one.kind, one.bytes) for one in compiled] == [("all-gather", 1024), ("all-reduce", 1024)]
    assert sum(one.sent_bytes for one in compiled) == 1.5 * requested[0].sent_bytes
    assert as_compiled(requested, 0, 0) == requested


def test_groups_in_an_unknown_notation_are_an_error() -> None:
    with pytest.raises(ValueError, match="unknown notation"):
        groups_of("replica_groups=<dialect>", 8)


def test_axes_are_those_along_which_any_group_differs() -> None:
    assert axes_of(np.array([[0, 1], [2, 3]]), {"a": 2, "b": 1, "c": 2}) == ("c",)
    assert axes_of(np.array([[0], [1]]), {"a": 2}) == ()
