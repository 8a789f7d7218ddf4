"""Loads batches of a mixture whose rates change at given steps (a curriculum)."""

import bisect
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence

from common.compute.length_sums import LengthSums
from common.data.batch import HostBatch
from common.data.loader import Loader, prefetched
from common.data.mixed_examples import MixedExamples, Unread


class StagedLoader:
    """The batches of a mixture with stages. Each stage has its own rates, and so its own `Loader`.

    Every part continues where the stage before stopped, first with the examples that were planned into rows of that
    stage's last window but not reached by its last step.
    """

    def __init__(
        self,
        first_steps: Sequence[int],
        open_stage: Callable[[int, Sequence[Unread] | None], tuple[MixedExamples, Loader]],
    ) -> None:
        """Opens the first stage; later ones are opened when a step of theirs is first read.

        Args:
          first_steps: the first step of each stage, ascending from 0.
          open_stage: opens stage i with what is unread of each part (None: all).
        """
        self._first_steps, self._open_stage = first_steps, open_stage
        self._lock = threading.RLock()
        self._landmarks: list[tuple[int, int]] = []
        self._stages = [open_stage(0, None)]

    @property
    def content(self) -> str:
        """Describes what the stream is read from; starts a chain of fingerprints."""
        first = self._stages[0][1].content
        return first if len(self._first_steps) == 1 else json.dumps([first, list(self._first_steps)])

    def batch(self, step: int) -> HostBatch:
        """Returns this process's share of the rows of one step."""
        stage = self._stage(step)
        return self._loader(stage).batch(step - self._first_steps[stage])

    def iterate(self, start: int, stop: int, *, threads: int = 1, buffered: int = 4) -> Iterator[HostBatch]:
        """Yields the batches of steps `start` to `stop - 1`, as `Loader.iterate` does."""
        return prefetched(self.batch, start, stop, threads=threads, buffered=buffered)

    def filled(self) -> tuple[int, LengthSums]:
        """Returns what `Loader.filled` does, for the first stage."""
        return self._stages[0][1].filled()

    def landmarks(self, step: int) -> tuple[int, ...]:
        """Returns the landmarks of each stage's `Loader`, up to the stage of the step before."""
        last = self._stage(step - 1)
        ends = [*self._first_steps[1 : last + 1], step]
        steps = [end - first for first, end in zip(self._first_steps, ends, strict=False)]
        return tuple(itertools.chain(*(self._loader(stage).landmarks(n) for stage, n in enumerate(steps))))

    def recall(self, landmarks: Sequence[int]) -> None:
        """Restores the `landmarks` of the same stream, as `Loader.recall` does."""
        with self._lock:
            self._landmarks = list(zip(landmarks[::2], landmarks[1::2], strict=True))
            for (_, loader), landmark in zip(self._stages, self._landmarks, strict=False):
                loader.recall(landmark)

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self._first_steps, step) - 1

    def _loader(self, stage: int) -> Loader:
        """Returns the loader of a stage, after opening those before it."""
        with self._lock:
            while stage >= len(self._stages):
                examples, loader = self._stages[-1]
                new = len(self._stages)
                consumed = loader.consumed(self._first_steps[new] - self._first_steps[new - 1])
                self._stages.append(self._open_stage(new, examples.unread_after(*consumed)))
                if new < len(self._landmarks):
                    self._stages[new][1].recall(self._landmarks[new])
            return self._stages[stage][1]
