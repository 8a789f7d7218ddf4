"""Checkpoints by Orbax: written asynchronously and atomically; the last few and the best are kept."""

import dataclasses
import logging
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from common.errors import UserError
from common.json_text import parse_json
from common.sharding.hosts import processes_where
from common.train.checksums import digest, leaf_checksums, plain_digest, plain_sums
from common.train.state import TrainState
from common.train.storage import patiently
from common.trees import flatten

SCHEMA_VERSION = 2
"""The schema that is written. The first one, whose checksums ignore the order of elements, can still be read."""
PROGRESS = "progress"
"""Folder of the JSON that is saved with the arrays."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """What a run knows besides its arrays; saved as JSON in the checkpoint. Counts are since step 0."""

    consumed_batches: int
    """Skipped ones included."""
    fingerprint: str
    """Chained over all applied batches, hexadecimal."""
    source_fingerprint: str | None = None
    """As `fingerprint`, over what was read of the source alone; it begins empty. None after a checkpoint of an earlier
    version, which lacks it."""
    examples: int = 0
    tokens: int = 0
    """Real input and target tokens."""
    input_tokens: int = 0
    loss_tokens: int = 0
    useful_flops: float = 0.0
    """Training FLOPs of the real tokens, each example counted alone, full attention."""
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    eval_seconds: float = 0.0
    skipped: tuple[int, ...] = ()
    """Numbers of the skipped batches, from 1."""
    losses: tuple[tuple[int, float], ...] = ()
    """(step, loss) of recent steps, as many as spike detection needs."""
    landmarks: tuple[int, ...] = ()
    """What the stream's seeker needs to find the next batch quickly; nothing but time depends on them."""


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, *, keep_last: int):
        """Raises UserError if `folder` exists and is not a directory."""
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a directory: move it away, or train into another --run-dir")
        self.folder, self._keep = folder, _LastAndBest(folder, keep_last)
        self._failed = False
        self._unwaited = False
        """Whether a save has begun whose end `wait` has not seen; without one there is nothing to ask Orbax."""
        self._manager = self._open_manager()

    def _open_manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder.resolve(),
            handler_registry=_handlers(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                cleanup_tmp_directories=True,
                lightweight_initialize=True,  # otherwise Orbax fails if a file of any checkpoint is damaged
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
            self._manager = self._open_manager()
            self._failed = False
        tree = _tree(state)
        sums = jax.device_get(leaf_checksums(tree))
        about = {
            "schema_version": SCHEMA_VERSION,
            "seed": seed,
            "validation_loss": validation_loss,
            "parameter_checksums": {name: int(x) for name, x in flatten(sums["params"]).items()},
            **dataclasses.asdict(progress),
        }
        about["digest"] = digest(sums, about)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), **{PROGRESS: ocp.args.JsonSave(about)})
        self._keep.losses[progress.consumed_batches] = validation_loss
        self._unwaited = True
        try:
            # `force` keeps Orbax from asking whether SIGTERM has arrived: several processes must count these questions
            # alike (see `Preemption.requested`).
            began = self._manager.save(
                progress.consumed_batches,
                args=args,
                force=jax.process_count() > 1,
            )
        except Exception:
            self._failed = True
            raise
        assert began, f"step {progress.consumed_batches} is not after {self._manager.latest_step()}"

    def writing(self) -> bool:
        """Returns whether a save is in progress."""
        return self._unwaited and not self._failed and self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Waits until the last save is complete. Raises what storage raised, once."""
        if self._unwaited and not self._failed:
            try:
                self._manager.wait_until_finished()
            except Exception:
                self._failed = True
                raise
            self._unwaited = False

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, oldest first; does not wait for one being written."""
        return saved_steps(self.folder)

    def restore(
        self,
        abstract: TrainState,
        *,
        seed: int,
        skipped: frozenset[int] = frozenset(),
        patience_seconds: float = 0.0,
    ) -> tuple[TrainState, Progress] | None:
        """Reads the newest good checkpoint onto the shardings of `abstract`; returns None if there are no checkpoints.

        Falls back to the checkpoint before one that is unreadable, which is logged, or that has learnt from a batch in
        `skipped`, and deletes those. Retries for `patience_seconds` when storage refuses. Raises UserError for another
        schema, if all are unreadable, or if storage keeps refusing; then no checkpoint is touched.
        """
        self.wait()
        steps = sorted(self._manager.all_steps(), reverse=True)
        unreadable, outdated, restored = [], [], None
        for step in steps:
            try:
                restored = patiently(
                    lambda step=step: self._read(step, abstract, seed, skipped),  # type: ignore[misc]
                    f"checkpoint {step} in {self.folder}",
                    patience_seconds=patience_seconds,
                    note=log.warning,
                    advice="nothing was changed: repair the storage, then repeat the command",
                )
                break
            except UserError:
                raise
            except _LearntFromSkipped:
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

    def _read(self, step: int, abstract: TrainState, seed: int, skipped: frozenset[int]) -> tuple[TrainState, Progress]:
        about, tree = self._load(step, abstract, skipped)
        if not _is_what_was_saved(tree, about):
            raise ValueError("its checksums differ from those that were saved")
        assert about["seed"] == seed, "the run directory's config was checked before"
        known = {field.name: about[field.name] for field in dataclasses.fields(Progress) if field.name in about}
        known["skipped"] = tuple(known.get("skipped", ()))
        known["landmarks"] = tuple(known.get("landmarks", ()))
        known["losses"] = tuple((at, loss) for at, loss in known.get("losses", ()))
        return TrainState(**tree), Progress(**known)

    def _load(self, step: int, abstract: TrainState, skipped: frozenset[int]) -> tuple[dict[str, Any], Any]:
        """Returns the JSON and the arrays of a checkpoint, unverified. If a process cannot read them, all raise."""
        # Uses Orbax's handlers, since its manager would wait for a process that has failed to read.
        folder = epath.Path(self.folder.resolve() / str(step))
        failure: Exception | None = None
        try:
            about = read_about(self.folder, step, "train into another --run-dir")
            if not {batch for batch in skipped if batch <= step} <= set(about.get("skipped", ())):
                raise _LearntFromSkipped
            arrays = ocp.args.StandardRestore(_tree(abstract))
            tree = ocp.StandardCheckpointHandler().restore(folder / "state", args=arrays)
        except (UserError, _LearntFromSkipped):
            raise
        except Exception as error:  # as in `restore`
            failure = error
        if unable := processes_where(failure is not None):
            raise failure or ValueError(f"see the error of process {unable[0]}")
        return about, tree

    def close(self) -> None:
        """Waits for the last save, and logs it if it fails: the run has already ended."""
        if not self._failed:
            try:
                self._manager.wait_until_finished()
                self._manager.close()
            except Exception as error:
                log.warning(
                    "the last checkpoint in %s was not written (%s)", self.folder, textwrap.shorten(str(error), 200)
                )


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `folder`, oldest first."""
    return sorted(ocp.utils.checkpoint_steps(folder.resolve())) if folder.is_dir() else []


def describe_newest(folder: Path) -> str:
    """Returns a clause for messages that names the newest complete checkpoint."""
    steps = saved_steps(folder)
    newest = f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"
    return f"{newest} in {folder}"


class _LearntFromSkipped(Exception):
    """A checkpoint from before a rollback: it has learnt from a batch that is skipped now."""


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """Writes arrays uncompressed: compressing float32 numbers takes most of a save's time and saves 8 %."""
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add("state", ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
    handlers.add("state", ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
    handlers.add(PROGRESS, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    handlers.add(PROGRESS, ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    return handlers


def read_about(folder: Path, step: int, advice: str) -> dict[str, Any]:
    """Reads the JSON that is saved with the arrays of a checkpoint.

    Raises UserError with `advice` for a schema that this version does not read, and ValueError if the JSON is damaged
    or belongs to another step than the folder's name.
    """
    about = parse_json((folder / str(step) / PROGRESS / "metadata").read_bytes(), finite=False)
    if not isinstance(about, dict):
        raise ValueError("its metadata is not a JSON object")
    if (schema := about["schema_version"]) not in range(1, SCHEMA_VERSION + 1):
        raise UserError(
            f"{folder}/{step} has checkpoint schema {schema}, this version reads 1 to {SCHEMA_VERSION}: {advice}"
        )
    if about["consumed_batches"] != step:
        raise ValueError(f"it belongs to step {about['consumed_batches']}")
    return about


def changed_parameter(params: Mapping[str, Any], about: Mapping[str, Any]) -> str | None:
    """Returns the dotted name of a parameter whose checksum differs from the saved one; None if all agree."""
    sums = jax.device_get((plain_sums if about["schema_version"] == 1 else leaf_checksums)(dict(params)))
    saved = about.get("parameter_checksums", {})  # the earliest checkpoints have none
    return next((name for name, found in sums.items() if saved.get(name, found) != found), None)


def _is_what_was_saved(tree: Any, about: dict[str, Any]) -> bool:
    if about["schema_version"] == 1:
        return plain_digest(plain_sums(tree)) == about["checksum"]
    rest = {key: value for key, value in about.items() if key != "digest"}
    return digest(leaf_checksums(tree), rest) == about["digest"]


def _tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


class _LastAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the last checkpoints and the one with the lowest validation loss (the last of several that share it)."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last
        self.losses: dict[int, float | None] = {}
        """Validation loss by step; None for a step between validations or whose loss cannot be read."""

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        losses = [self._loss(checkpoint.step) for checkpoint in checkpoints]
        best = min((loss for loss in losses if loss is not None), default=None)
        last = range(len(losses))[-self.keep_last :]
        kept = {*last, *[i for i, loss in enumerate(losses) if best is not None and loss == best][-1:]}
        return [i in kept for i in range(len(losses))]

    def _loss(self, step: int) -> float | None:
        if step not in self.losses:
            self.losses[step] = _saved_loss(self.folder / str(step))
        return self.losses[step]


def _saved_loss(checkpoint: Path) -> float | None:
    for path in (
        checkpoint / PROGRESS / "metadata",
        checkpoint / "metrics" / "metrics",
    ):  # the latter in the first schema
        try:
            loss = parse_json(path.read_bytes(), finite=False).get("validation_loss")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(loss, float) and math.isfinite(loss):
            return loss
    return None
