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
from etils import epath
from orbax.checkpoint import checkpoint_managers

from common.errors import UserError
from common.sharding.hosts import where
from common.train.paths import flatten
from common.train.state import TrainState
from common.train.storage import patiently

SCHEMA_VERSION = 1

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run knows beside its arrays; JSON in the checkpoint. Counts are since step 0."""

    consumed_batches: int
    """Those that were left out among them."""
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
    checkpoint_seconds: float = 0.0
    eval_seconds: float = 0.0
    skipped: tuple[int, ...] = ()
    """Numbers of the batches, from 1, that were not learnt from."""
    losses: tuple[tuple[int, float], ...] = ()
    """Step and loss of the last steps, as far as it depends on them what is a spike."""


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, *, keep_last: int):
        self.folder, self.keep_last = folder, keep_last
        self._failed = False
        self._manager = self._opened()

    def _opened(self) -> ocp.CheckpointManager:
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(self.keep_last),
                checkpoint_managers.BestN(get_metric_fn=_validation_loss, reverse=True, n=1),
            ]
        )
        return ocp.CheckpointManager(
            self.folder.resolve(),
            handler_registry=_handlers(),
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
        """Starts writing the state after `progress.consumed_batches` steps; returns once the arrays are copied.

        Raises what storage raises, now or when `wait` is called.
        """
        if self._failed:  # an Orbax manager remembers some of a failed save
            self._manager = self._opened()
            self._failed = False
        tree = _tree(state)
        sums = jax.device_get(leaf_checksums(tree))
        about = {
            "schema_version": SCHEMA_VERSION,
            "seed": seed,
            "checksum": _checksum(sums),
            "parameter_checksums": {name: int(x) for name, x in flatten(sums["params"]).items()},
        }
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree), progress=ocp.args.JsonSave(about | dataclasses.asdict(progress))
        )
        loss = math.inf if validation_loss is None else validation_loss
        try:
            # Of several processes Orbax would ask for itself whether SIGTERM has come, and they would lose count of the
            # steps; forced, it does not ask.
            began = self._manager.save(
                progress.consumed_batches,
                args=args,
                metrics={"validation_loss": loss},
                force=jax.process_count() > 1,
            )
        except Exception:
            self._failed = True
            raise
        assert began, f"step {progress.consumed_batches} is not after {self._manager.latest_step()}"

    def writing(self) -> bool:
        """Whether a save is under way."""
        return not self._failed and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Until the last save is whole; raises what storage raised, once."""
        if not self._failed:
            try:
                self._manager.wait_until_finished()
            except Exception:
                self._failed = True
                raise

    def steps(self) -> list[int]:
        """Of whole checkpoints, oldest first; one being written is not waited for."""
        return saved_steps(self.folder)

    def last_good(self) -> str:
        return last_good(self.folder)

    def restore(
        self,
        abstract: TrainState,
        *,
        seed: int,
        left_out: frozenset[int] = frozenset(),
        patience_seconds: float = 0.0,
    ) -> tuple[TrainState, Progress] | None:
        """The newest checkpoint that can be read, onto the shardings of `abstract`; None where there is none.

        An unreadable one is named and the one before is taken, and so is one that has learnt from a batch of
        `left_out`. Storage that refuses is asked again for `patience_seconds`. Raises UserError for another schema, if
        none is good, or if storage goes on refusing; then no checkpoint is touched.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        unreadable, outdated, restored = [], [], None
        for step in steps:
            try:
                restored = patiently(
                    lambda step=step: self._read(step, abstract, seed, left_out),  # type: ignore[misc]
                    f"checkpoint {step} in {self.folder}",
                    patience_seconds=patience_seconds,
                    note=log.warning,
                    advice="nothing was changed: mend the storage, then repeat the command",
                )
                break
            except UserError:
                raise
            except _LearntFromLeftOut:
                outdated.append(step)
            except Exception as error:  # Orbax raises bare Exceptions for arrays that are torn
                why = textwrap.shorten(str(error.__cause__ or error), 200)
                log.warning("checkpoint %d in %s cannot be read (%s); trying the one before", step, self.folder, why)
                unreadable.append(step)
        if restored is None and unreadable:
            raise UserError(f"none of the checkpoints in {self.folder} can be read: train into another --run-dir")
        for bad in unreadable + outdated:  # their steps will be saved again
            self._manager.delete(bad)
        return restored

    def _read(
        self, step: int, abstract: TrainState, seed: int, left_out: frozenset[int]
    ) -> tuple[TrainState, Progress]:
        about, tree = self._load(step, abstract, left_out)
        saved_seed = about.pop("seed")
        assert saved_seed == seed, "the run directory's config was checked before"
        about.pop("parameter_checksums", None)
        if _checksum(leaf_checksums(tree)) != about.pop("checksum"):
            raise ValueError("its arrays are not those that were saved")
        losses = tuple((at, loss) for at, loss in about.pop("losses", ()))
        return TrainState(**tree), Progress(**about, losses=losses)

    def _load(self, step: int, abstract: TrainState, left_out: frozenset[int]) -> tuple[dict[str, Any], Any]:
        """(What is said of it, its arrays), unchecked. All processes can read them, or it raises in all."""
        # By Orbax's handlers themselves: its manager would wait for a process that has failed to read.
        folder = epath.Path(self.folder.resolve() / str(step))
        failure: Exception | None = None
        try:
            about = dict(ocp.JsonCheckpointHandler().restore(folder / "progress", args=ocp.args.JsonRestore()))
            check_schema(about.pop("schema_version"), f"{self.folder}/{step}", "train into another --run-dir")
            about["skipped"] = tuple(about.get("skipped", ()))
            if not {batch for batch in left_out if batch <= step} <= set(about["skipped"]):
                raise _LearntFromLeftOut
            arrays = ocp.args.StandardRestore(_tree(abstract))
            tree = ocp.StandardCheckpointHandler().restore(folder / "state", args=arrays)
        except (UserError, _LearntFromLeftOut):
            raise
        except Exception as error:  # as in `restore`
            failure = error
        if unable := where(failure is not None):
            raise failure or ValueError(f"process {unable[0]} says why")
        return about, tree

    def close(self) -> None:
        """Waits for the last save; one that failed has been told of."""
        if not self._failed:
            self._manager.wait_until_finished()
            self._manager.close()


def saved_steps(folder: Path) -> list[int]:
    """Of the whole checkpoints in it, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(folder.resolve())) if folder.is_dir() else []


def last_good(folder: Path) -> str:
    """A clause that names the newest whole checkpoint."""
    steps = saved_steps(folder)
    newest = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
    return f"{newest} in {folder}"


class _LearntFromLeftOut(Exception):
    """A checkpoint of a history that the run has been rolled back from."""


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Arrays are written as they are: compressing float32 numbers costs most of a save's time and gains 8 %."""
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add("state", ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
    handlers.add("state", ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
    handlers.add("progress", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    handlers.add("progress", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    return handlers


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
