"""Checkpoints by Orbax: asynchronous, atomic, the last few and the best."""

import dataclasses
import logging
import math
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from common.errors import UserError
from common.train.paths import flatten
from common.train.state import TrainState

SCHEMA_VERSION = 1

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run knows beside its arrays; JSON in the checkpoint. Counts are since step 0."""

    consumed_batches: int
    fingerprint: str
    """Chained over all applied batches, hexadecimal."""
    examples: int = 0
    tokens: int = 0
    """Real input and target tokens."""
    input_tokens: int = 0
    loss_tokens: int = 0
    useful_flops: float = 0.0
    """Training FLOPs of the real tokens, each example by itself, full attention."""
    train_seconds: float = 0.0
    data_seconds: float = 0.0


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, *, keep_last: int):
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(keep_last),
                checkpoint_managers.BestN(get_metric_fn=_validation_loss, reverse=True, n=1),
            ]
        )
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            item_names=("state", "progress"),
            # Without best_fn metrics are not stored, and after a restart the best checkpoint would be forgotten.
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, best_fn=_validation_loss, best_mode="min", cleanup_tmp_directories=True
            ),
        )

    def save(
        self,
        state: TrainState,
        progress: Progress,
        *,
        seed: int,
        validation_loss: float | None,
    ) -> None:
        """Starts writing the state after `progress.consumed_batches` steps; returns once the arrays are copied."""
        tree = _tree(state)
        sums = jax.device_get(leaf_checksums(tree))
        about = {
            "schema_version": SCHEMA_VERSION,
            "seed": seed,
            "checksum": _checksum(sums),
            "parameter_checksums": {name: int(x) for name, x in flatten(sums["params"]).items()},
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), progress=ocp.args.JsonSave(about | dataclasses.asdict(progress))
        )
        loss = math.inf if validation_loss is None else validation_loss
        self._manager.save(progress.consumed_batches, args=args, metrics={"validation_loss": loss})

    def latest_step(self) -> int | None:
        """Of the newest complete checkpoint; waits for one being written."""
        self._manager.wait_until_finished()
        return self._manager.latest_step()

    def restore(self, abstract: TrainState, *, seed: int) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint that can be read, onto the shardings of `abstract`; None where there is none.

        An unreadable one is named and the one before is taken. Raises UserError for another schema or if none is good.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        unreadable = []
        for step in steps:
            try:
                restored = self._read(step, abstract, seed)
            except UserError:
                raise
            except Exception as error:  # Orbax raises bare Exceptions for arrays that are torn
                why = textwrap.shorten(str(error.__cause__ or error), 200)
                log.warning("checkpoint %d in %s cannot be read (%s); trying the one before", step, self.folder, why)
                unreadable.append(step)
                continue
            for bad in unreadable:  # their steps will be saved again
                self._manager.delete(bad)
            return restored
        if steps:
            raise UserError(f"none of the checkpoints in {self.folder} can be read: train into another --run-dir")
        return None

    def _read(self, step: int, abstract: TrainState, seed: int) -> tuple[TrainState, Progress]:
        found = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        about = dict(found["progress"])
        check_schema(about.pop("schema_version"), f"{self.folder}/{step}", "train into another --run-dir")
        saved_seed = about.pop("seed")
        assert saved_seed == seed, "the run directory's config was checked before"
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_tree(abstract)))
        tree = self._manager.restore(step, args=args)["state"]
        about.pop("parameter_checksums", None)
        if _checksum(leaf_checksums(tree)) != about.pop("checksum"):
            raise ValueError("its arrays are not those that were saved")
        return TrainState(**tree), Progress(**about)

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()


def check_schema(schema: int, where: str, advice: str) -> None:
    """Raises UserError for a checkpoint of another version."""
    if schema != SCHEMA_VERSION:
        raise UserError(f"{where} has checkpoint schema {schema}, this version reads {SCHEMA_VERSION}: {advice}")


def _tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _validation_loss(metrics: dict[str, float]) -> float:
    """Infinite where a checkpoint was saved between validations."""
    return metrics["validation_loss"]


@jax.jit
def leaf_checksums(tree: Any) -> Any:
    """uint32 over the bits of each array, however it is sharded: files carry no checksum of their contents."""

    def one(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
        return jnp.sum(bits, dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def _checksum(leaf_checksums: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(leaf_checksums):
        total = (total * 31 + int(leaf)) % 2**32
    return total
