"""Loads batches by random access: the rows of a step follow from (seed, plan) alone, in whatever order steps are read.

The only state of a stream is the number of batches consumed. Each process makes the rows of a step that its devices
hold; threads prefetch whole batches and cannot reorder them.

Legend: E examples.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from common.compute.length_sums import LengthSums
from common.data.batch import HostBatch
from common.data.block_layout import FINGERPRINT_BYTES, NO_EXAMPLES, build_batch
from common.data.examples import Examples
from common.data.packing import RowPlans


class Loader:
    """The batches of one split. This process makes its share of each batch's rows."""

    def __init__(
        self,
        examples: Examples,
        plans: RowPlans,
        *,
        rows: int,
        share: Sequence[int] | None = None,
        slots: tuple[int, int] | None = None,
    ) -> None:
        """Loads the rows that `plans` makes of `examples`.

        Args:
          rows: rows a step, over all processes.
          share: the rows of a batch (0 to `rows` - 1) that this process makes; None: all.
          slots: (input slots, target slots) of a row; None: those of `plans`.
        """
        self._slots = plans.limits if slots is None else slots
        self._examples, self._plans, self._rows = examples, plans, rows
        self._share = range(rows) if share is None else share

    @property
    def content(self) -> str:
        """Describes what the stream is read from; starts a chain of fingerprints."""
        return self._examples.content

    def batch(self, step: int) -> HostBatch:
        """Returns this process's share of rows `step * rows` to `(step + 1) * rows - 1` of the stream."""
        return self._build([self._plans.row(step * self._rows + row) for row in self._share])

    def iterate(self, start: int, stop: int, *, threads: int = 1, buffered: int = 4) -> Iterator[HostBatch]:
        """Yields the batches of steps `start` to `stop - 1`, prefetched by `threads` threads (0: made on demand).

        At most `buffered` batches wait. Neither number changes the batches.
        """
        return prefetched(self.batch, start, stop, threads=threads, buffered=buffered)

    def landmarks(self, step: int) -> tuple[int, ...]:
        """Returns what `recall` needs to resume from `step` (1 or more) without planning the steps before it."""
        return self._plans.landmark(step * self._rows - 1)

    def recall(self, landmarks: Sequence[int]) -> None:
        """Restores the `landmarks` of a loader of the same stream."""
        if landmarks:
            self._plans.recall(*landmarks)

    def consumed(self, steps: int) -> tuple[int, np.ndarray]:
        """Returns which examples the first `steps` steps consume, as (end, pending_E): all numbers before `end` except
        `pending_E` (ascending), which were planned into later rows of the last window."""
        window, last = self._plans.locate(steps * self._rows - 1)
        later = range(last + 1, len(self._plans.plan(window)))
        pending = [NO_EXAMPLES, *(self._plans.numbers(window, row) for row in later)]
        return (window + 1) * self._examples.window, np.sort(np.concatenate(pending))

    def validation_batches(self, limit: int | None = None) -> Iterator[HostBatch]:
        """Yields each row of the first window once, always in the same order; at most `limit` batches.

        Empty rows (segments 0, weights 0, neither counted nor hashed) complete the last batch.
        """
        plan = self._plans.plan(0)
        batches = -(-len(plan) // self._rows)
        for step in range(0, batches if limit is None else min(batches, limit)):
            rows = (step * self._rows + row for row in self._share)
            yield self._build([self._plans.numbers(0, row) if row < len(plan) else NO_EXAMPLES for row in rows])

    def filled(self) -> tuple[int, LengthSums]:
        """Returns (rows of the first window, sums over their examples), which show how many slots are padding."""
        plan = self._plans.plan(0)
        lengths = self._examples.lengths(np.concatenate([self._plans.numbers(0, row) for row in range(len(plan))]))
        return len(plan), LengthSums.of_examples(*lengths)

    def _build(self, rows: Sequence[np.ndarray]) -> HostBatch:
        input_length, target_length = self._slots
        return build_batch(self._examples, rows, input_length=input_length, target_length=target_length)


def prefetched(
    batch: Callable[[int], HostBatch], start: int, stop: int, *, threads: int, buffered: int
) -> Iterator[HostBatch]:
    """Yields `batch(start)` to `batch(stop - 1)`, prefetched as `Loader.iterate` describes."""
    steps = grain.MapDataset.range(start, stop).map(batch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffered, threads))
    # Whole batches are prefetched: grouping rows afterwards would depend on the number of threads.
    yield from steps.to_iter_dataset(options)


def chain(previous: str, fingerprint: int) -> str:
    """Chains the fingerprint of one more applied batch to a run's: 128 bits in hexadecimal, dependent on the order.

    `previous` is the chain so far; a chain starts with the stream's `content`, one of source fingerprints with "".

    >>> chain(chain("content", 1), 2) == chain(chain("content", 2), 1)
    False
    """
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    digest.update(previous.encode())
    digest.update(fingerprint.to_bytes(FINGERPRINT_BYTES, "little"))
    return digest.hexdigest()
