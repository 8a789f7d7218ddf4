"""What trains, and its compiled programs: mesh, shardings, one jitted step over the family's protocol."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.compute.length_sums import LengthSums
from common.compute.model_config import ModelConfig
from common.data.batch import Batch, HostBatch
from common.errors import UserError
from common.model import Model, Skeleton, skeleton
from common.sharding.hosts import counts_here, place_rows, rows_here, start_sum
from common.sharding.mesh import make_mesh
from common.sharding.rules import Strategy, strategy
from common.sharding.shape import ROW_AXES
from common.train.config import TrainConfig
from common.train.optimizer import make_optimizer, make_schedule
from common.train.state import TrainState, abstract_state, state_shardings
from common.train.step import make_eval_step, make_train_step

KEPT = 8
"""Prepared setups that a process remembers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What trains, and for how long; enough to compile the step."""

    build: Callable[[nnx.Rngs], Model]
    model: ModelConfig
    train: TrainConfig
    learning_rate: float
    """Peak, or what the schedule takes in its place."""
    steps: int
    row_slots: tuple[int, int, int]
    """Rows, input slots and target slots of a batch, over all hosts."""

    def flops_per_step(self) -> int:
        """Training FLOPs, full attention, padding included."""
        return self.model.flops(LengthSums.of_rows(*self.row_slots)).train_full_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What a batch holds, over all processes; as in a `HostBatch`."""

    fingerprint: int
    examples: int
    loss_tokens: int
    length_sums: LengthSums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled step and what it needs."""

    mesh: Mesh
    model: Skeleton
    optimizer: Any
    shardings: TrainState
    batch_sharding: NamedSharding
    rows: int
    """Of a batch, over all processes."""
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped

    @functools.cached_property
    def held(self) -> list[int]:
        """Numbers of the rows that this process feeds. Raises UserError as `rows_here` does."""
        return rows_here(self.batch_sharding, self.rows)

    @functools.cached_property
    def _counts(self) -> bool:
        return counts_here(self.batch_sharding, self.rows)

    def put(self, batch: Batch) -> Batch:
        """This process's rows onto its devices."""
        return jax.tree.map(lambda x: place_rows(self.batch_sharding, self.rows, self.held, x), batch)

    def count(self, host: HostBatch) -> Callable[[], Counts]:
        """Starts to add up what all processes have in their batches; waits when it is asked for."""
        mine = (host.fingerprint, host.examples, host.loss_tokens, *dataclasses.astuple(host.length_sums))
        added = start_sum(mine if self._counts else [0] * len(mine))

        def result() -> Counts:
            fingerprint, examples, loss_tokens, *sums = added()
            names = (field.name for field in dataclasses.fields(LengthSums))
            return Counts(
                fingerprint=fingerprint % 2**128,
                examples=examples,
                loss_tokens=loss_tokens,
                length_sums=LengthSums(**dict(zip(names, sums, strict=True))),
            )

        return result


def check_rows(setup: Setup) -> None:
    """Raises UserError where a batch's rows do not divide over devices and micro-batches, or a row over `context`."""
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
    """Mesh, shardings and jitted functions, for this machine's devices or for others; nothing is computed yet.

    Equal arguments give the same object, so that what a process trains again is neither traced nor compiled again.
    """
    return _make_programs(setup, None if devices is None else tuple(devices))


@functools.lru_cache(maxsize=KEPT)
def _make_programs(setup: Setup, devices: tuple[jax.Device, ...] | None) -> Programs:
    with strategy(setup.train.sharding):
        return _programs(setup, make_mesh(setup.train.mesh, devices))


def _programs(setup: Setup, mesh: Mesh) -> Programs:
    train = setup.train
    model = skeleton(setup.build)
    schedule = make_schedule(train.schedule, setup.learning_rate, setup.steps)
    optimizer = make_optimizer(train.optimizer, schedule, model.logical_axes)
    shardings = state_shardings(model, optimizer, mesh)
    step = make_train_step(
        model,
        optimizer,
        execution=train.execution,
        z_loss=setup.model.recipe.z_loss,
        accumulation=train.accumulation,
        seed=train.seed,
        guarded=train.anomalies.guards_step,
    )
    return Programs(
        mesh=mesh,
        model=model,
        optimizer=optimizer,
        shardings=shardings,
        batch_sharding=NamedSharding(mesh, PartitionSpec(ROW_AXES, "context")),
        rows=setup.row_slots[0],
        train_step=jax.jit(_following(train.sharding, step), donate_argnums=0, out_shardings=(shardings, None)),
        eval_step=jax.jit(_following(train.sharding, make_eval_step(model, execution=train.execution))),
    )


def _following(name: Strategy, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced by that table of rules whenever it is traced."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with strategy(name):
            return function(*args)

    return traced


def lower_step(setup: Setup, programs: Programs, state: TrainState | None = None) -> jax.stages.Lowered:
    """The training step for a state of these shapes and shardings, or for what `init_state` would make; to compile."""
    if state is None:
        state = abstract_state(programs.model, programs.optimizer, programs.shardings)
    batch = abstract_batch(setup.row_slots, programs.batch_sharding)
    limit = (np.float32(0),) if setup.train.anomalies.guards_step else ()
    with jax.set_mesh(programs.mesh):
        return programs.train_step.lower(state, batch, *limit)


def abstract_batch(row_slots: tuple[int, int, int], sharding: NamedSharding) -> Batch:
    """Shapes and dtypes of a batch of `(rows, input slots, target slots)`."""
    rows, input_length, target_length = row_slots
    lengths = {"I": input_length, "T": target_length}

    def abstract(name: str) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if name == "weights_BT" else jnp.int32
        return jax.ShapeDtypeStruct((rows, lengths[name[-1]]), dtype, sharding=sharding)

    return Batch(**{field.name: abstract(field.name) for field in dataclasses.fields(Batch)})
