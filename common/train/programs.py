"""A setup and the programs that train it: mesh, shardings, one jitted step over the family's protocol.

Runs of one process that differ only in numbers (learning rate, schedule, steps, seeds) share their programs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.compute.length_sums import LengthSums
from common.compute.model_config import ModelConfig
from common.data.batch import Batch, HostBatch
from common.errors import UserError
from common.model import Model, Skeleton, skeleton
from common.nn.parametrization import update_scales
from common.recipe import Execution, Parametrization
from common.sharding.hosts import counts_here, place_rows, rows_here, start_sum
from common.sharding.mesh import make_mesh
from common.sharding.rules import Strategy, strategy
from common.sharding.shape import ROW_AXES, MeshShape
from common.train.config import Optimizer, TrainConfig, check_optimizer
from common.train.optimizer import make_optimizer
from common.train.state import TrainState, abstract_state, make_init, state_shardings
from common.train.step import Guard, Numbers, make_eval_step, make_train_step

CACHED_PROGRAMS = 32
"""How many kinds of runs a process remembers the programs of; a study may go through its arms once for each seed."""
LENGTH_SUMS = tuple(field.name for field in dataclasses.fields(LengthSums))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What to train and for how long; enough to compile the step."""

    build: Callable[[nnx.Rngs], Model]
    model: ModelConfig
    train: TrainConfig
    learning_rate: float
    """The schedule's peak, or the base of `InverseSqrt`."""
    steps: int
    row_slots: tuple[int, int, int]
    """Rows of a batch over all processes, and input and target slots of a row."""

    def flops_per_step(self) -> int:
        """Returns training FLOPs with full attention, padding included."""
        return self.model.flops(LengthSums.of_rows(*self.row_slots)).train_full_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compiled:
    """What enters a setup's programs as constants. Setups that agree in it share them."""

    build: Callable[[nnx.Rngs], Model]
    z_loss: float
    parametrization: Parametrization
    optimizer: Optimizer
    accumulation: int
    mesh: MeshShape
    sharding: Strategy
    execution: Execution
    guarded: bool
    rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What a batch holds over all processes; the fields mean what they do in a `HostBatch`."""

    fingerprint: int
    source_fingerprint: int
    examples: int
    loss_tokens: int
    length_sums: LengthSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The jitted steps and what they need."""

    mesh: Mesh
    model: Skeleton
    optimizer: optax.GradientTransformation
    """The optimizer at learning rate 1; the step takes the rate as an argument."""
    shardings: TrainState
    batch_sharding: NamedSharding
    rows: int
    """Rows of a batch over all processes."""
    init: Callable[[Any], TrainState]
    """`make_init`'s function."""
    train_step: jax.stages.Wrapped
    """`make_train_step`'s function; donates the state."""
    eval_step: jax.stages.Wrapped

    @functools.cached_property
    def local_rows(self) -> list[int]:
        """Numbers of the rows that this process feeds. Raises UserError as `rows_here` does."""
        return rows_here(self.batch_sharding, self.rows)

    @functools.cached_property
    def _counts_here(self) -> bool:
        return counts_here(self.batch_sharding, self.rows)

    def put(self, batch: Batch) -> Batch:
        """Puts this process's rows onto its devices, as part of a batch that is sharded over all."""
        return jax.tree.map(lambda x: place_rows(self.batch_sharding, self.rows, self.local_rows, x), batch)

    def replicate(self, scalars: Any) -> Any:
        """Puts a tree of scalars, equal in all processes, onto all devices; leaves those that are there already."""
        sharding = NamedSharding(self.mesh, PartitionSpec())

        def place(x: Any) -> jax.Array:
            on_devices = isinstance(x, jax.Array)
            return x if on_devices else jax.make_array_from_callback((), sharding, lambda _: np.asarray(x))

        return jax.tree.map(place, scalars)

    def count(self, host: HostBatch) -> Callable[[], Counts]:
        """Starts to add up the counts of all processes' rows; the returned function waits for the sum."""
        hashes = (host.fingerprint, host.source_fingerprint)
        sums_here = (getattr(host.length_sums, name) for name in LENGTH_SUMS)
        mine = (*hashes, host.examples, host.loss_tokens, *sums_here)
        added = start_sum(mine if self._counts_here else [0] * len(mine))

        def result() -> Counts:
            fingerprint, source_fingerprint, examples, loss_tokens, *sums = added()
            return Counts(
                fingerprint=fingerprint % 2**128,
                source_fingerprint=source_fingerprint % 2**128,
                examples=examples,
                loss_tokens=loss_tokens,
                length_sums=LengthSums(**dict(zip(LENGTH_SUMS, sums, strict=True))),
            )

        return result


def check_rows(setup: Setup) -> None:
    """Raises UserError if a batch's rows do not divide over devices and micro-batches, or its slots over `context`."""
    mesh, accumulation, rows = setup.train.mesh, setup.train.accumulation, setup.row_slots[0]
    parts = mesh.row_parts * accumulation
    if rows % parts:
        raise UserError(
            f"data.rows is {rows}, which does not divide by replica x data x fsdp x accumulation "
            f"({mesh.replica} x {mesh.data} x {mesh.fsdp} x {accumulation}); "
            f"nearest: {max(1, round(rows / parts)) * parts}"
        )
    for name, slots in zip(("input_length", "target_length"), setup.row_slots[1:], strict=True):
        if slots % mesh.context:
            raise UserError(
                f"data.{name} is {slots}, which does not divide by train.mesh.context ({mesh.context}); "
                f"nearest: {max(1, round(slots / mesh.context)) * mesh.context}"
            )


def make_programs(setup: Setup, devices: Sequence[jax.Device] | None = None) -> Programs:
    """Makes mesh, shardings and jitted functions, for this machine's devices or others; computes nothing yet.

    Setups that differ only in learning rate, schedule, steps, seed, or in how a run is watched return the same object,
    so that a process traces and compiles each program once for all of them. Raises UserError as `check_optimizer` does.
    """
    train = setup.train
    check_optimizer(train.optimizer, setup.model.recipe)
    compiled = _Compiled(
        build=setup.build,
        z_loss=setup.model.recipe.z_loss,
        parametrization=setup.model.recipe.parametrization,
        optimizer=train.optimizer,
        accumulation=train.accumulation,
        mesh=train.mesh,
        sharding=train.sharding,
        execution=train.execution,
        guarded=train.anomalies.guards_step,
        rows=setup.row_slots[0],
    )
    return _make_programs(compiled, None if devices is None else tuple(devices))


@functools.lru_cache(maxsize=CACHED_PROGRAMS)
def _make_programs(compiled: _Compiled, devices: tuple[jax.Device, ...] | None) -> Programs:
    with strategy(compiled.sharding):
        return _programs(compiled, make_mesh(compiled.mesh, devices))


def _programs(compiled: _Compiled, mesh: Mesh) -> Programs:
    model, execution = skeleton(compiled.build), compiled.execution
    scales = update_scales(compiled.parametrization, model.logical_axes, model.shapes)

    def at_rate(rate: Any) -> optax.GradientTransformation:
        return make_optimizer(compiled.optimizer, lambda _: rate, model.logical_axes, scales)

    optimizer = at_rate(np.float32(1))
    shardings = state_shardings(model, optimizer, mesh)
    step = make_train_step(
        model,
        at_rate,
        execution=execution,
        z_loss=compiled.z_loss,
        accumulation=compiled.accumulation,
        guarded=compiled.guarded,
    )
    return Programs(
        mesh=mesh,
        model=model,
        optimizer=optimizer,
        shardings=shardings,
        batch_sharding=NamedSharding(mesh, PartitionSpec(ROW_AXES, "context")),
        rows=compiled.rows,
        init=make_init(model, optimizer, shardings),
        train_step=jax.jit(_under_rules(compiled.sharding, step), donate_argnums=0, out_shardings=(shardings, None)),
        eval_step=jax.jit(_under_rules(compiled.sharding, make_eval_step(model, execution=execution))),
    )


def _under_rules(name: Strategy, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `function` so that it is traced under the sharding rules of that name."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with strategy(name):
            return function(*args)

    return traced


def lower_step(setup: Setup, programs: Programs, state: TrainState | None = None) -> jax.stages.Lowered:
    """Lowers the training step, ready to compile, for a state like `state`, or like that of `init_state` if None."""
    if state is None:
        state = abstract_state(programs.model, programs.optimizer, programs.shardings)
    batch = abstract_batch(setup.row_slots, programs.batch_sharding)
    numbers = abstract_numbers(setup.train.anomalies.guards_step, NamedSharding(programs.mesh, PartitionSpec()))
    with jax.set_mesh(programs.mesh):
        return programs.train_step.lower(state, batch, numbers)


def abstract_numbers(guarded: bool, sharding: NamedSharding) -> Numbers:
    """Returns dtypes and shardings of a step's numbers."""

    def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=sharding)

    rate = scalar(jnp.float32)
    guard = Guard(limit=rate, updates=scalar(jnp.int32), rate_after_skip=rate) if guarded else None
    return Numbers(seed=scalar(jnp.uint32), learning_rate=rate, guard=guard)


def abstract_batch(row_slots: tuple[int, int, int], sharding: NamedSharding) -> Batch:
    """Returns shapes, dtypes and shardings of a batch of `(rows, input slots, target slots)`."""
    rows, input_length, target_length = row_slots
    lengths = {"I": input_length, "T": target_length}

    def abstract(name: str) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if name == "weights_BT" else jnp.int32
        return jax.ShapeDtypeStruct((rows, lengths[name[-1]]), dtype, sharding=sharding)

    return Batch(**{field.name: abstract(field.name) for field in dataclasses.fields(Batch)})
