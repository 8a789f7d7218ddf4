"""The jitted step: accumulation, weights, shardings, donation, randomness."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from common.data.batch import Batch
from common.sharding.rules import Strategy
from common.sharding.shape import MeshShape
from common.train.config import AdamW
from common.train.programs import Programs, make_programs
from common.train.state import TrainState, init_state
from tests.helpers import close, random_rows
from tests.tiny import INPUTS, RECIPE, ROWS, TARGETS, numbers, setup, tiny, train_config

FAMILIES = ("gpt", "t5like")
families = pytest.mark.parametrize("family", FAMILIES)
ONE_DEVICE = MeshShape()
EIGHT = [
    MeshShape(data=8),
    MeshShape(fsdp=8),
    MeshShape(data=2, fsdp=2, tensor=2),
    MeshShape(replica=2, fsdp=2, context=2),
    MeshShape(fsdp=2, context=2, tensor=2),
]
RATE = 3e-2
Positions = Literal["rope", "t5_bias"]
MESHES = [*((mesh, "fsdp") for mesh in (*EIGHT, MeshShape(tensor=2), MeshShape(context=2))), (EIGHT[-1], "sequence")]


@functools.cache
def programs(
    family: str,
    mesh: MeshShape = ONE_DEVICE,
    accumulation: int = 1,
    dropout: float = 0.0,
    sharding: Strategy = "fsdp",
    positions: Positions = "rope",
) -> Programs:
    """Returns the step as the loop compiles it, without clipping, so that first moments are a tenth of the gradient."""
    train = train_config(
        optimizer=AdamW(b1=0.9, epsilon=1e-3, clip_norm=1e9),
        mesh=mesh,
        sharding=sharding,
        accumulation=accumulation,
    )
    return make_programs(setup(tiny(family, dataclasses.replace(RECIPE, dropout=dropout, positions=positions)), train))


@functools.cache
def initial(family: str, mesh: MeshShape = ONE_DEVICE) -> TrainState:
    """The state at step 0, on the host."""
    made = programs(family, mesh)
    return jax.tree.map(np.array, init_state(made.model, made.optimizer, 0, made.shardings))


def fresh(family: str, made: Programs, **change: Any) -> TrainState:
    """Returns the state at step 0 on the mesh; a copy, since a step donates its state."""
    return jax.device_put(jax.tree.map(np.copy, dataclasses.replace(initial(family), **change)), made.shardings)


def apply(made: Programs, state: TrainState, batch: Batch, seed: int = 0) -> tuple[TrainState, dict[str, float]]:
    """Takes one of 8 steps at a rate that falls to zero."""
    rate = RATE * max(0.0, 1 - int(state.step) / 8)
    with jax.set_mesh(made.mesh):
        state, metrics = made.train_step(state, made.put(batch), numbers(rate, seed=seed))
    return state, {name: float(value) for name, value in metrics.items()}


@functools.cache
def batch_of(seed: int = 0) -> Batch:
    """Returns packed rows whose weights differ widely, between rows and within them; one row has none."""
    batch = jax.tree.map(np.asarray, random_rows(ROWS, INPUTS, TARGETS, seed))
    rng = np.random.default_rng(seed)
    by_row = rng.permutation(np.array([0, 0.1, 0.3, 1, 1, 2, 5, 10], np.float32))[:, None]
    weights = batch.weights_BT * by_row * rng.uniform(0.5, 1.5, batch.weights_BT.shape).astype(np.float32)
    return dataclasses.replace(batch, weights_BT=weights)


def gradients(state: TrainState) -> Any:
    """Returns the gradients of one step from zero moments."""
    return jax.tree.map(lambda m: np.asarray(m) / 0.1, state.opt_state[1][0].mu)


def test_loss_is_per_weighted_token() -> None:
    """Agrees with whole logits, NumPy's softmax in float64, and the gradient of the weighted mean."""
    made, batch = programs("gpt"), batch_of()
    weights_BT = np.asarray(batch.weights_BT, np.float64)

    def mean(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = made.model.merge(params)
        logits_BTV = model.hidden(batch) @ model.head()
        ce_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), batch.targets_BT[..., None], axis=-1)[..., 0]
        return (ce_BT * batch.weights_BT).sum() / batch.weights_BT.sum(), logits_BTV

    device_batch = jax.tree.map(jnp.asarray, batch)
    gradient, logits_BTV = jax.jit(jax.grad(mean, has_aux=True))(initial("gpt").params, device_batch)
    x_BTV = np.asarray(logits_BTV, np.float64)
    chosen_BT = np.take_along_axis(x_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    ce_BT = np.log(np.exp(x_BTV).sum(-1)) - chosen_BT
    state, metrics = apply(made, fresh("gpt", made), batch)
    assert metrics["loss"] == pytest.approx((ce_BT * weights_BT).sum() / weights_BT.sum(), rel=1e-6)
    close(gradients(state), gradient, 1e-5)
    squares = sum(np.square(g, dtype=np.float64).sum() for g in jax.tree.leaves(gradient))
    assert metrics["grad_norm"] == pytest.approx(squares**0.5, rel=1e-5)
    assert int(state.step) == 1


@pytest.mark.parametrize(("family", "count"), [("gpt", 2), pytest.param("t5like", 4, marks=pytest.mark.slow)])
def test_micro_batches_are_one_big_batch(family: str, count: int) -> None:
    batch = batch_of()
    big, parts = programs(family), programs(family, accumulation=count)
    whole, whole_metrics = apply(big, fresh(family, big), batch)
    summed, summed_metrics = apply(parts, fresh(family, parts), batch)
    close(gradients(summed), gradients(whole), 1e-5)
    close(summed.params, whole.params, 1e-5)
    assert summed_metrics == pytest.approx(whole_metrics, rel=1e-5)
    # Rows of unequal weight: a mean of means would have shown.
    means = [loss_of_rows(family, np.arange(ROWS) % count == part) for part in range(count)]
    assert np.mean(means) != pytest.approx(whole_metrics["loss"], rel=1e-3)


def loss_of_rows(family: str, chosen_B: np.ndarray) -> float:
    made, batch = programs(family), batch_of()
    masked = dataclasses.replace(batch, weights_BT=np.where(chosen_B[:, None], batch.weights_BT, 0))
    ce, weight = made.eval_step(initial(family).params, masked)
    return float(ce) / float(weight)


@functools.cache
def losses(family: str, mesh: MeshShape, sharding: Strategy = "fsdp") -> tuple[list[float], TrainState]:
    made = programs(family, mesh, sharding=sharding)
    state = fresh(family, made)
    found = []
    for step in range(20):
        state, metrics = apply(made, state, batch_of(step % 2))
        found.append(metrics["loss"])
    return found, state


def bytes_on_one_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("family", "mesh", "sharding"),
    [
        # Quick: meshes of several axes, one family each.
        pytest.param(
            family, mesh, sharding, marks=[] if (number + side) % 2 and number in (2, 3, 4, 7) else pytest.mark.slow
        )
        for number, (mesh, sharding) in enumerate(MESHES)
        for side, family in enumerate(FAMILIES)
    ],
    ids=str,
)
def test_sharded_is_single_device(family: str, mesh: MeshShape, sharding: Strategy) -> None:
    """Twenty steps from the same seed: the same losses and parameters, on one device and on several."""
    alone, last = losses(family, ONE_DEVICE)
    together, sharded = losses(family, mesh, sharding)
    assert together == pytest.approx(alone, rel=1e-5)
    assert alone[-1] < alone[0] - 1  # something was learned that could have differed
    close(sharded.params, last.params, 1e-4)
    # Parameters and both moments lie split over fsdp and tensor: each device holds its part and no more.
    least = 1 / (mesh.fsdp * mesh.tensor)
    share = bytes_on_one_device(sharded) / bytes_on_one_device(last)
    assert least <= share <= least * 1.1 if mesh.tensor == 1 else least <= share < 1 / mesh.fsdp
    matrix = sharded.params["embedding"]["table_VD"]
    assert matrix.sharding.spec == PartitionSpec("tensor", "fsdp")
    assert matrix.addressable_shards[0].data.shape == (128 // mesh.tensor, 16 // mesh.fsdp)
    assert len({shard.device for shard in matrix.addressable_shards}) == mesh.devices


@pytest.mark.parametrize(
    ("family", "sharding"),
    [
        ("gpt", "sequence"),
        pytest.param("t5like", "fsdp", marks=pytest.mark.slow),
        pytest.param("gpt", "fsdp", marks=pytest.mark.slow),
        pytest.param("t5like", "sequence", marks=pytest.mark.slow),
    ],
)
def test_relative_bias_is_the_same_on_a_mesh(family: str, sharding: Strategy) -> None:
    """Compares gradients of one step, including the bias table's, with rows, lengths and heads sharded."""
    alone, together = (
        programs(family, mesh, sharding=sharding, positions="t5_bias") for mesh in (ONE_DEVICE, EIGHT[-1])
    )
    start = jax.tree.map(np.array, init_state(alone.model, alone.optimizer, 0, alone.shardings))
    found = []
    for made in (alone, together):
        state, metrics = apply(made, jax.device_put(jax.tree.map(np.copy, start), made.shardings), batch_of())
        found.append((gradients(state), metrics["loss"]))
    (one, loss), (other, loss_together) = found
    assert loss_together == pytest.approx(loss, rel=1e-6)
    close(other, one, 1e-5)
    biases = [leaf for path, leaf in jax.tree.leaves_with_path(one) if "bias" in jax.tree_util.keystr(path)]
    assert biases and all(np.abs(leaf).max() > 1e-6 for leaf in biases)


def test_a_state_created_sharded_is_the_same_state() -> None:
    for one, other in zip(*(jax.tree.leaves(initial("gpt", mesh)) for mesh in (ONE_DEVICE, EIGHT[2])), strict=True):
        np.testing.assert_array_equal(one, other)


@families
def test_the_state_is_donated(family: str) -> None:
    made = programs(family)
    before = fresh(family, made)
    after, _ = apply(made, before, batch_of())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_a_batch_without_weight_leaves_finite_numbers() -> None:
    """Loss and gradient are zero, so only weight decay changes anything, and no norm's scale."""
    made = programs("gpt")
    empty = dataclasses.replace(batch_of(), weights_BT=np.zeros((ROWS, TARGETS), np.float32))
    state, metrics = apply(made, fresh("gpt", made), empty)
    assert metrics == {"loss": 0.0, "grad_norm": 0.0}
    before = initial("gpt").params
    decayed = {"embedding": before["embedding"]["table_VD"] * (1 - RATE * AdamW().weight_decay)}
    close(state.params["embedding"]["table_VD"], decayed["embedding"], 1e-6)
    assert (np.asarray(state.params["final_norm"]["scale_D"]) == before["final_norm"]["scale_D"]).all()
    ce, weight = made.eval_step(state.params, made.put(empty))
    assert (float(ce), float(weight)) == (0.0, 0.0)


@families
def test_a_step_is_deterministic(family: str) -> None:
    made = programs(family)
    (first, a), (again, b) = (apply(made, fresh(family, made), batch_of()) for _ in range(2))
    assert a == b
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        assert (np.asarray(x) == np.asarray(y)).all()


def test_dropout_depends_on_seed_and_step_alone() -> None:
    made = programs("gpt", dropout=0.5)

    def loss(made: Programs, step: int, seed: int = 0) -> float:
        return apply(made, fresh("gpt", made, step=np.int32(step)), batch_of(), seed)[1]["loss"]

    by_step = [loss(made, step) for step in range(3)]
    assert len(set(by_step)) == 3
    assert loss(made, 1) == by_step[1]  # whatever was run in between
    assert loss(made, 1, seed=1) not in by_step
    eight = programs("gpt", mesh=MeshShape(data=8), dropout=0.5)
    assert loss(eight, 1) == pytest.approx(by_step[1], rel=1e-5)
