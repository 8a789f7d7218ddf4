"""Checkpoints by Orbax: asynchronous, atomic, the last few and the best."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from common.errors import UserError
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
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics["validation_loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        self.folder = folder
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            item_names=("state", "progress"),
            options=ocp.CheckpointManagerOptions(preservation_policy=keep, cleanup_tmp_directories=True),
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
        about = {"schema_version": SCHEMA_VERSION, "seed": seed, **dataclasses.asdict(progress)}
        self._manager.save(
            progress.consumed_batches,
            args=ocp.args.Composite(state=ocp.args.StandardSave(_tree(state)), progress=ocp.args.JsonSave(about)),
            metrics=None if validation_loss is None else {"validation_loss": validation_loss},
        )

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
                args = ocp.args.Composite(
                    state=ocp.args.StandardRestore(_tree(abstract)), progress=ocp.args.JsonRestore()
                )
                found = self._manager.restore(step, args=args)
            except Exception as error:  # Orbax raises bare Exceptions for arrays that are torn
                log.warning("checkpoint %d in %s cannot be read (%s); trying the one before", step, self.folder, error)
                unreadable.append(step)
                continue
            for bad in unreadable:  # their steps will be saved again
                self._manager.delete(bad)
            about = dict(found["progress"])
            schema, saved_seed = about.pop("schema_version"), about.pop("seed")
            if schema != SCHEMA_VERSION:
                raise UserError(
                    f"{self.folder}/{step} has checkpoint schema {schema}, this version reads {SCHEMA_VERSION}: "
                    f"train into another --run-dir"
                )
            assert saved_seed == seed, "the run directory's config was checked before"
            return TrainState(**found["state"]), Progress(**about)
        if steps:
            raise UserError(f"none of the checkpoints in {self.folder} can be read: train into another --run-dir")
        return None

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()


def _tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
