"""Saving while storage may refuse: training goes on meanwhile, and stops where it refuses for too long."""

import time
from collections.abc import Callable

from common.errors import UserError
from common.train.checkpoints import Checkpoints, Progress
from common.train.state import TrainState
from common.train.storage import Backoff, refusal


class Saving:
    """The saves of one run. A state that could not be written is given up for a later one, which loses nothing."""

    def __init__(
        self, checkpoints: Checkpoints, *, seed: int, patience_seconds: float, note: Callable[[str], None]
    ) -> None:
        self.checkpoints, self.seed, self.note = checkpoints, seed, note
        self._backoff = Backoff(patience_seconds)
        self._again_at: float | None = None

    def due(self) -> bool:
        """Whether a save has failed, and it is time for the next attempt.

        Raises UserError when saves have failed for too long.
        """
        if self._again_at is None and not self.checkpoints.writing():
            self._wait()
        return self._again_at is not None and time.monotonic() >= self._again_at

    def save(self, state: TrainState, progress: Progress, validation_loss: float | None) -> None:
        """Starts to write; returns once the arrays are copied. Raises UserError as `due` does."""
        self._again_at = None
        try:
            self.checkpoints.save(state, progress, seed=self.seed, validation_loss=validation_loss)
        except Exception as error:
            self._refused(error)

    def finish(self, state: TrainState, progress: Progress, validation_loss: float | None) -> None:
        """Waits until this state, which was given to `save`, is written. Raises UserError as `due` does."""
        self._wait()
        while self._again_at is not None:
            time.sleep(max(0.0, self._again_at - time.monotonic()))
            self.save(state, progress, validation_loss)
            self._wait()

    def _wait(self) -> None:
        if self._again_at is not None:
            return
        try:
            self.checkpoints.wait()
        except Exception as error:
            self._refused(error)
        else:
            if self._backoff.refused_seconds:
                self.note(f"saved again, step {self.checkpoints.steps()[-1]}")
            self._backoff.reset()

    def _refused(self, error: Exception) -> None:
        why = refusal(error)
        if why is None and not self.checkpoints.folder.is_dir():
            raise UserError(
                f"{self.checkpoints.folder} is gone, or no directory any more: something else removed it while the run "
                "went on; stopped"
            ) from error
        if why is None:
            raise error
        pause = self._backoff.pause()
        if pause is None:
            raise UserError(
                f"nothing could be saved for {self._backoff.refused_seconds:.0f} s ({why}); stopped, "
                f"{self.checkpoints.last_good()}: mend the storage, then the same command goes on from there"
            ) from error
        self.note(f"a checkpoint could not be written ({why}); the next attempt is in {pause:.0f} s")
        self._again_at = time.monotonic() + pause
