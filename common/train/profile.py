"""Traces some steps of a run for XProf and TensorBoard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


class Profile:
    """Traces `steps` steps, starting with step `first`, into `folder`; does nothing when `steps` is 0."""

    def __init__(self, folder: Path, *, first: int, steps: int, note: Callable[[str], None]):
        self.folder, self.note = folder, note
        self.first, self.end = first, first + steps
        self._tracing = False

    def before(self, step: int, state: Any) -> None:
        """Must be called before each step with the state that the step starts from."""
        if step == self.first and self.first < self.end:
            jax.block_until_ready(state)  # the trace begins with this step
            jax.profiler.start_trace(self.folder)
            self._tracing = True
        elif step == self.end:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends the trace if one is running, as when the run ends before it."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            self.note(f"traced; to view: tensorboard --logdir {self.folder} (with tensorboard-plugin-profile)")
