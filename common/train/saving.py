"""Saves checkpoints while storage may refuse: training continues meanwhile, and stops if it refuses for too long."""

import time

from common.errors import UserError
from common.train.checkpoints import Progress, describe_newest
from common.train.run import Launch
from common.train.state import TrainState
from common.train.storage import Backoff, refusal


class Saving:
    """Saves the checkpoints of one run. After a refusal it saves a later state instead, which loses nothing."""

    def __init__(self, run: Launch) -> None:
        self.checkpoints, self.seed, self.note = run.checkpoints, run.task.setup.train.seed, run.watcher.note
        self._backoff = Backoff(run.storage_seconds)
        self._retry_at: float | None = None
        """When to try again after a refusal, by `time.monotonic`; None after a success."""

    def due(self) -> bool:
        """Returns whether a save has failed and it is time for the next attempt.

        Raises UserError if saves have failed for too long.
        """
        if self._retry_at is None and not self.checkpoints.writing():
            self._wait()
        return self._retry_at is not None and time.monotonic() >= self._retry_at

    def save(self, state: TrainState, progress: Progress, validation_loss: float | None) -> None:
        """Starts to write; returns once the arrays are copied. Raises UserError as `due` does."""
        self._retry_at = None
        try:
            self.checkpoints.save(state, progress, seed=self.seed, validation_loss=validation_loss)
        except Exception as error:
            self._retry_later(error)

    def finish(self, state: TrainState, progress: Progress, validation_loss: float | None) -> None:
        """Waits until this state, which was last passed to `save`, is written. Raises UserError as `due` does."""
        self._wait()
        while self._retry_at is not None:
            time.sleep(max(0.0, self._retry_at - time.monotonic()))
            self.save(state, progress, validation_loss)
            self._wait()

    def _wait(self) -> None:
        """Waits for the save in progress, if one is."""
        if self._retry_at is not None:
            return
        try:
            self.checkpoints.wait()
        except Exception as error:
            self._retry_later(error)
        else:
            if self._backoff.refused_seconds:
                self.note(f"saved again, step {self.checkpoints.steps()[-1]}")
            self._backoff.reset()

    def _retry_later(self, error: Exception) -> None:
        """Schedules the next attempt. Raises UserError if patience is exhausted, and `error` if waiting is no help."""
        why = refusal(error)
        if why is None and not self.checkpoints.folder.is_dir():
            raise UserError(
                f"{self.checkpoints.folder} is gone or no longer a directory: another program removed it during the "
                "run; stopped"
            ) from error
        if why is None:
            raise error
        pause = self._backoff.pause()
        if pause is None:
            raise UserError(
                f"nothing could be saved for {self._backoff.refused_seconds:.0f} s ({why}); stopped, "
                f"{describe_newest(self.checkpoints.folder)}: repair the storage, then repeat the command to resume "
                "there"
            ) from error
        self.note(f"a checkpoint could not be written ({why}); the next attempt is in {pause:.0f} s")
        self._retry_at = time.monotonic() + pause
