"""Adafactor against NumPy written from the paper and T5X's description, against Optax's, sharded, and saved."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from common.files import read_rows
from common.model import skeleton
from common.nn.parameters import normal, param
from common.recipe import T5_V1_1
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.train.adafactor import Factored
from common.train.checkpoints import Checkpoints, Progress
from common.train.config import Adafactor, Budget, InverseSqrt, Linear
from common.train.loop import fit
from common.train.optimizer import make_optimizer, make_schedule
from common.train.programs import make_programs
from common.train.run_files import RunFiles
from common.train.state import TrainState, abstract_state, init_state, state_shardings
from common.trees import flatten
from tests.tiny import Observer, setup, task, tiny, train_config

CONFIG = Adafactor(min_factored=6)
LAYERS = 3
MATRIX = ("embed", "mlp")
AXES: dict[str, tuple[str, ...]] = {
    "table": ("vocab", "embed"),
    "mlp": ("layers", *MATRIX),
    "query": ("layers", "embed", "heads", "head_dim"),
    "out": ("layers", "heads", "head_dim", "embed"),
    "few_columns": ("layers", "embed", "kv_heads", "head_dim"),
    "query_bias": ("layers", "heads", "head_dim"),
    "norm": ("layers", "embed"),
    "final_norm": ("embed",),
    "relative": ("heads", "buckets"),
}
SIZES = {"vocab": 10, "embed": 8, "mlp": 12, "heads": 4, "kv_heads": 2, "head_dim": 2, "buckets": 7, "layers": LAYERS}
SHAPES = {name: tuple(SIZES[axis] for axis in axes) for name, axes in AXES.items()}
FACTORED = {"table": (1,), "mlp": (0,), "query": (0,), "out": (2,)}
"""Row dimensions of one layer; the rest are columns."""

Tree = dict[str, Any]


def draw(seed: int, scale: float = 1.0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Tree:
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def run(params: Tree, gradients: Sequence[Tree], axes: Any = AXES, config: Adafactor = CONFIG) -> tuple[Tree, Any]:
    """Returns parameters and state after an update by each gradient, at rates 0.1, 0.075, 0.05, ..."""
    optimizer = make_optimizer(config, make_schedule(Linear(), 0.1, 4), axes)

    @jax.jit
    def update(grads: Tree, state: Any, params: Tree) -> tuple[Tree, Any]:
        with jax.numpy_dtype_promotion("standard"):  # as the step does
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    for grads in gradients:
        params, state = update(grads, state, params)
    return params, state


class OneMatrix:
    """One layer of one parameter, in float64, its factored axes flattened to a matrix as in the paper."""

    def __init__(self, value: np.ndarray, rows: tuple[int, ...] | None):
        self.p, self.rows = value.astype(np.float64), rows
        self.v: Any = 0.0
        self.r: Any = 0.0
        self.c: Any = 0.0

    def step(self, number: int, grad: np.ndarray, rate: float) -> None:
        decay = 1 - number**-0.8
        square = grad.astype(np.float64) ** 2 + 1e-30
        if self.rows is None:
            self.v = decay * self.v + (1 - decay) * square
            estimate = self.v
        else:
            ordered = np.moveaxis(square, self.rows, range(len(self.rows)))
            matrix = ordered.reshape(math.prod(ordered.shape[: len(self.rows)]), -1)
            self.r = decay * self.r + (1 - decay) * matrix.sum(axis=1)
            self.c = decay * self.c + (1 - decay) * matrix.sum(axis=0)
            estimate = np.outer(self.r, self.c) / self.r.sum()  # Algorithm 4 of the paper, of sums
            estimate = np.moveaxis(estimate.reshape(ordered.shape), range(len(self.rows)), self.rows)
        update = grad / np.sqrt(estimate)
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        self.p -= rate * max(1e-3, np.sqrt(np.mean(self.p**2))) * update


def by_numpy(params: Tree, gradients: Sequence[Tree]) -> Tree:
    found = {}
    for name, value in params.items():
        stacked = AXES[name][0] == "layers"
        parts = [OneMatrix(part, FACTORED.get(name)) for part in (value if stacked else value[None])]
        for number, grads in enumerate(gradients, start=1):
            for layer, part in enumerate(parts):
                grad = grads[name][layer] if stacked else grads[name]
                part.step(number, grad, 0.1 - 0.025 * (number - 1))
        found[name] = np.stack([part.p for part in parts]) if stacked else parts[0].p
    return found


def test_it_is_numpys() -> None:
    """Three steps, with gradients and layers of very different magnitudes."""
    params = draw(0)
    for name, axes in AXES.items():
        if axes[0] == "layers":
            params[name] *= np.float32([1e-5, 1.0, 30.0]).reshape(-1, *(1,) * (len(axes) - 1))
    gradients = [draw(1), draw(2, 1e3), draw(3, 1e-4)]
    found, _ = run(params, gradients)
    for name, expected in by_numpy(params, gradients).items():
        # Of the change, so that layers whose parameters are large do not hide it.
        moved = np.abs(expected - params[name]).max()
        np.testing.assert_allclose(found[name], expected, atol=1e-5 * moved + 4e-6 * np.abs(expected).max(), rtol=1e-5)


def test_stacked_layers_are_separate_layers() -> None:
    """Updates are equal to the bit: no layer sees another's statistics or magnitude."""
    params, gradients = draw(0), [draw(1), draw(2, 100.0)]
    stacked, _ = run(params, gradients)
    names = [name for name, axes in AXES.items() if axes[0] == "layers"]
    alone_axes = {name: AXES[name][1:] for name in names}
    for layer in range(LAYERS):
        take = [{name: tree[name][layer] for name in names} for tree in (params, *gradients)]
        alone, _ = run(take[0], take[1:], alone_axes)
        for name in names:
            np.testing.assert_array_equal(stacked[name][layer], alone[name], err_msg=name)


def test_a_matrix_is_as_optaxs() -> None:
    """For a leaf that is one matrix or one vector, optax's Adafactor gives the same updates."""
    axes = {"matrix": MATRIX, "vector": ("embed",)}
    shapes = {"matrix": (130, 140), "vector": (130,)}
    params, gradients = draw(0, 1.0, shapes), [draw(seed, 1.0, shapes) for seed in (1, 2, 3)]
    found, _ = run(params, gradients, axes, Adafactor())
    peer = optax.adafactor(make_schedule(Linear(), 0.1, 4))
    state = peer.init(params)
    expected = params
    with jax.numpy_dtype_promotion("standard"):
        for grads in gradients:
            updates, state = peer.update(grads, state, expected)
            expected = optax.apply_updates(expected, updates)
    for name in axes:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


def moments_of(state: Any) -> dict[str, Any]:
    return state[0].moments


def test_statistics_are_as_small_as_they_should_be() -> None:
    """Each layer's matrix has row and column means; only small matrices and vectors are not factored."""
    _, state = run(draw(0), [])
    shapes = jax.tree.map(np.shape, moments_of(state))
    for name, moment in moments_of(state).items():
        assert isinstance(moment, Factored) == (name in FACTORED), name
    assert shapes["query"] == Factored(row=(3, 8, 1, 1), column=(3, 1, 4, 2))
    assert shapes["out"] == Factored(row=(3, 1, 1, 8), column=(3, 4, 2, 1))
    assert shapes["table"] == Factored(row=(1, 8), column=(10, 1))
    assert shapes["few_columns"] == SHAPES["few_columns"]
    assert shapes["norm"] == SHAPES["norm"]


@pytest.mark.parametrize(("heads", "factored"), [(1, False), (2, True)])
def test_heads_and_head_dim_are_one_axis(heads: int, factored: bool) -> None:
    """64 channels are too few to be factored, 2 x 64 are enough."""
    params = {"query": np.ones((1, 128, heads, 64), np.float32)}
    _, state = run(params, [], {"query": AXES["query"]}, Adafactor())
    assert isinstance(moments_of(state)["query"], Factored) == factored


def test_a_zero_gradient_moves_nothing() -> None:
    params = draw(0)
    found, _ = run(params, [jax.tree.map(np.zeros_like, params)] * 2)
    for name in params:
        np.testing.assert_array_equal(found[name], params[name])


def test_gradients_size_does_not_matter_but_to_clipping() -> None:
    params = draw(0)
    small, large = ([draw(1, scale), draw(2, scale)] for scale in (1.0, 1e4))
    one, other = run(params, small)[0], run(params, large)[0]
    for name in params:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)
    clip = Adafactor(min_factored=6, clip_norm=1e-12)
    clipped = run(params, [draw(1), draw(2, 1e4)], config=clip)[0]
    same = run(params, [draw(1, 1e-3), draw(2, 1e-3)], config=clip)[0]
    for name in params:  # every gradient is clipped to the same norm, whatever it was
        np.testing.assert_allclose(clipped[name], same[name], rtol=1e-4, atol=1e-5)


# --- In a state


class Module(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        for name, axes in AXES.items():
            sizes = {**SIZES, "heads": 4, "kv_heads": 2, "vocab": 8}
            setattr(self, name, param(rngs, normal(1.0), tuple(sizes[axis] for axis in axes), axes))


MODEL: Any = skeleton(Module)  # no family: only parameters are asked for
MESH = MeshShape(data=2, fsdp=2, tensor=2)


def optimizer_of(axes: Any) -> optax.GradientTransformation:
    return make_optimizer(CONFIG, make_schedule(InverseSqrt(warmup_steps=2), 1.0, 4), axes)


def advance(state: TrainState, optimizer: Any, grads: Tree) -> TrainState:
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)


def trained(mesh_shape: MeshShape) -> tuple[TrainState, TrainState]:
    """Returns state and shardings after two updates."""
    optimizer = optimizer_of(MODEL.logical_axes)
    shardings = state_shardings(MODEL, optimizer, make_mesh(mesh_shape))
    state = init_state(MODEL, optimizer, 0, shardings)
    step = jax.jit(lambda state, grads: advance(state, optimizer, grads), out_shardings=shardings)
    shapes = {name: shape.shape for name, shape in MODEL.shapes.items()}
    for seed in (1, 2):
        state = step(state, jax.device_put(draw(seed, 1.0, shapes), shardings.params))
    return state, shardings


def test_statistics_are_sharded_as_what_they_have_kept() -> None:
    state, _ = trained(MESH)
    spec = jax.tree.map(lambda x: x.sharding.spec, moments_of(state.opt_state))
    assert spec["query"] == Factored(
        row=PartitionSpec(None, "fsdp", None, None), column=PartitionSpec(None, None, "tensor", None)
    )
    assert spec["out"] == Factored(
        row=PartitionSpec(None, None, None, "fsdp"), column=PartitionSpec(None, "tensor", None, None)
    )
    assert spec["norm"] == PartitionSpec(None, "fsdp")
    single, _ = trained(MeshShape())
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)


def test_it_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    state, shardings = trained(MESH)
    abstract = abstract_state(MODEL, optimizer_of(MODEL.logical_axes), shardings)
    with contextlib.closing(Checkpoints(tmp_path, keep_last=1)) as checkpoints:
        checkpoints.save(state, Progress(consumed_batches=2, fingerprint=""), seed=0, validation_loss=None)
        restored = checkpoints.restore(abstract, seed=0)
    assert restored is not None
    assert jax.tree.structure(restored[0]) == jax.tree.structure(state)
    for one, other in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding


@pytest.mark.slow  # compiles a sharded network
def test_t5s_whole_recipe_trains(tmp_path: Path) -> None:
    """T5 v1.1 with Adafactor and its schedule, sharded: the first step is at most 0.01 of a parameter's RMS."""
    config = train_config(
        optimizer=Adafactor(min_factored=16),
        schedule=InverseSqrt(),
        budget=Budget(unit="steps", amount=1),
        mesh=MeshShape(data=2, fsdp=2, tensor=2),
    )
    made = dataclasses.replace(task("t5like"), setup=setup(tiny("t5like", T5_V1_1), config, learning_rate=1.0))
    fitted = fit(made, tmp_path, Observer())
    (row,) = read_rows(tmp_path / RunFiles.METRICS)
    assert math.isfinite(row["loss"]) and row["learning_rate"] == pytest.approx(0.01)
    programs = make_programs(made.setup)
    before = flatten(init_state(programs.model, programs.optimizer, config.seed, programs.shardings).params)
    for name, after in flatten(fitted.params).items():
        old, new = np.asarray(before[name], np.float64), np.asarray(after, np.float64)
        moved, size = (float(np.sqrt(np.mean(x**2))) for x in (new - old, old))
        assert 0 < moved < 1.001 * 0.01 * size, name


def test_its_state_is_a_small_part_of_adams() -> None:
    def size(**change: Any) -> int:
        programs = make_programs(setup(tiny("t5like"), train_config(**change)))
        state = jax.eval_shape(programs.optimizer.init, programs.model.shapes)
        return sum(math.prod(x.shape) for x in jax.tree.leaves(state))

    assert size(optimizer=Adafactor(min_factored=16)) < 0.1 * size()
