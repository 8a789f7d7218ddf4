"""Logical axis names are mapped to mesh axes."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from common.errors import UserError
from common.sharding.mesh import make_mesh
from common.sharding.rules import (
    STRATEGIES,
    all_gather_residual,
    compute_spec,
    constrain,
    parameter_shardings,
    reduce_scatter_residual,
    stored_spec,
    strategy,
)
from common.sharding.shape import MESH_AXES, ROW_AXES, MeshShape
from common.train.programs import make_programs
from tests.tiny import setup, tiny, train_config


def test_every_rule_names_an_axis_of_the_mesh() -> None:
    for rules in STRATEGIES.values():
        maps = [*rules.parameters.values(), *rules.compute.values()]
        assert {axis for rule in maps for axis in ((rule,) if isinstance(rule, str) else rule or ())} == set(MESH_AXES)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("layers", "embed", "kv_heads", "head_dim"), (None, "fsdp", "tensor", None)),
        (("layers", "mlp", "embed"), (None, "tensor", "fsdp")),
        (("vocab", "embed"), ("tensor", "fsdp")),
        ((), ()),
    ],
)
def test_stored_parameters(axes: tuple[str, ...], spec: tuple[object, ...]) -> None:
    assert stored_spec(axes) == PartitionSpec(*spec)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("embed", "kv_heads", "head_dim"), (None, "tensor", None)),
        (("batch", "length", "mlp"), (ROW_AXES, "context", "tensor")),
        (("batch", None, "heads", "head_dim"), (ROW_AXES, None, "tensor", None)),
    ],
)
def test_parameters_in_use_and_activations(axes: tuple[str | None, ...], spec: tuple[object, ...]) -> None:
    assert compute_spec(*axes) == PartitionSpec(*spec)


def test_a_strategy_applies_inside_its_block() -> None:
    with strategy("sequence"):
        assert compute_spec("batch", "residual", None) == PartitionSpec(ROW_AXES, ("context", "tensor"), None)
    assert compute_spec("batch", "residual", None) == PartitionSpec(ROW_AXES, "context", None)


def test_an_unknown_logical_axis_is_an_error() -> None:
    with pytest.raises(KeyError, match="heds"):
        compute_spec("heds")


@pytest.mark.parametrize("family", ["gpt", "t5like"])
def test_every_dimension_of_a_parameter_has_a_logical_axis(family: str) -> None:
    made = make_programs(setup(tiny(family), train_config(mesh=MeshShape(data=2, fsdp=2, tensor=2))))
    shardings = jax.tree.leaves(parameter_shardings(made.mesh, made.model.logical_axes))
    shapes = jax.tree.leaves(made.model.shapes)
    assert all(len(s.spec) == len(x.shape) for s, x in zip(shardings, shapes, strict=True))
    parts = [x.size // np.prod(s.shard_shape(x.shape)) for s, x in zip(shardings, shapes, strict=True)]
    assert set(parts) == {2, 4}  # norms are sharded over fsdp, matrices over fsdp and tensor: nothing is replicated


def test_constrain_sets_the_sharding_of_a_result() -> None:
    x = np.ones((8, 4, 2), np.float32)
    assert constrain(x, "batch", None, "heads") is x
    with jax.set_mesh(make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        y = jax.jit(lambda x: constrain(2 * x, "batch", None, "heads"))(x)
    assert y.sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert y.addressable_shards[0].data.shape == (2, 4, 1)


def test_a_dimension_that_does_not_divide_is_not_sharded() -> None:
    """Two devices cannot shard a length of one token."""
    with jax.set_mesh(make_mesh(MeshShape(fsdp=2, context=2, tensor=2))):
        x, one = (jax.jit(lambda x: constrain(x, "batch", "length", None))(np.ones((4, n, 3))) for n in (6, 1))
    assert x.addressable_shards[0].data.shape == (2, 3, 3) and one.addressable_shards[0].data.shape == (2, 1, 3)


@pytest.mark.parametrize(
    ("reshard", "after", "gradient_after"),
    [
        (all_gather_residual, "context", ("context", "tensor")),
        (reduce_scatter_residual, ("context", "tensor"), "context"),
    ],
)
def test_the_gradient_gets_the_sharding_of_the_operand(
    reshard: Callable[[jax.Array], jax.Array], after: object, gradient_after: object
) -> None:
    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(reshard, x)
        return y, pull(2 * y)[0]

    with jax.set_mesh(make_mesh(MeshShape(fsdp=2, context=2, tensor=2))), strategy("sequence"):
        y, gradient = jax.jit(both)(np.ones((4, 8, 3), np.float32))
    assert (y.sharding.spec[1], gradient.sharding.spec[1]) == (after, gradient_after)
    np.testing.assert_array_equal(gradient, 2 * np.ones((4, 8, 3)))


def test_a_mesh_uses_the_first_devices() -> None:
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"replica": 1, "data": 1, "fsdp": 2, "context": 1, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[:4]


def test_a_mesh_of_too_many_devices_is_refused() -> None:
    with pytest.raises(UserError, match="data=4,fsdp=2,tensor=2 needs 16 devices, but there are 8 .*data=8"):
        make_mesh(MeshShape(data=4, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshShape(tensor=4), "train.mesh.tensor is 4, which does not divide .*attention.*; nearest: tensor=2"),
        (MeshShape(fsdp=3), "train.mesh.fsdp is 3, which does not divide .*; nearest: fsdp=2"),
    ],
    ids=["heads", "width"],
)
def test_a_mesh_that_does_not_divide_a_parameter_is_refused(mesh: MeshShape, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_programs(setup(tiny("gpt"), train_config(mesh=mesh)))
