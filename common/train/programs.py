"""A setup and the programs that train it: mesh, shardings, one jitted step over the family's protocol."""

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

CACHED_SETUPS = 8
"""How many setups a process remembers the programs of."""


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
    optimizer: Any
    shardings: TrainState
    batch_sharding: NamedSharding
    rows: int
    """Rows of a batch over all processes."""
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

    def count(self, host: HostBatch) -> Callable[[], Counts]:
        """Starts to add up the counts of all processes' rows; the returned function waits for the sum."""
        hashes = (host.fingerprint, host.source_fingerprint)
        mine = (*hashes, host.examples, host.loss_tokens, *dataclasses.astuple(host.length_sums))
        added = start_sum(mine if self._counts_here else [0] * len(mine))

        def result() -> Counts:
            fingerprint, source_fingerprint, examples, loss_tokens, *sums = added()
            names = (field.name for field in dataclasses.fields(LengthSums))
            return Counts(
                fingerprint=fingerprint % 2**128,
                source_fingerprint=source_fingerprint % 2**128,
                examples=examples,
                loss_tokens=loss_tokens,
                length_sums=LengthSums(**dict(zip(names, sums, strict=True))),
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

    Equal arguments return the same object, so that a process that trains a setup again does not compile it again.
    """
    return _make_programs(setup, None if devices is None else tuple(devices))


@functools.lru_cache(maxsize=CACHED_SETUPS)
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
        train_step=jax.jit(_under_rules(train.sharding, step), donate_argnums=0, out_shardings=(shardings, None)),
        eval_step=jax.jit(_under_rules(train.sharding, make_eval_step(model, execution=train.execution))),
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
    limit = (np.float32(0),) if setup.train.anomalies.guards_step else ()
    with jax.set_mesh(programs.mesh):
        return programs.train_step.lower(state, batch, *limit)


def abstract_batch(row_slots: tuple[int, int, int], sharding: NamedSharding) -> Batch:
    """Returns shapes, dtypes and shardings of a batch of `(rows, input slots, target slots)`."""
    rows, input_length, target_length = row_slots
    lengths = {"I": input_length, "T": target_length}

    def abstract(name: str) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if name == "weights_BT" else jnp.int32
        return jax.ShapeDtypeStruct((rows, lengths[name[-1]]), dtype, sharding=sharding)

    return Batch(**{field.name: abstract(field.name) for field in dataclasses.fields(Batch)})
