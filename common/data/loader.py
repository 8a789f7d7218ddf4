"""Batches by random access: step n's rows follow from (seed, plan) alone, whoever asks and in whatever order.

The only state of a stream is the number of batches consumed. Each process makes the rows of a step that its devices
hold; threads prefetch whole batches and cannot reorder them.

Legend: B rows of this process, I input slots, T target slots, N examples in the batch (row after row), P tokens of one
side of all N examples, end to end.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from common.compute.length_sums import LengthSums
from common.data.batch import Batch, HostBatch
from common.data.config import DataConfig
from common.data.examples import Examples
from common.data.objectives.apply import Example
from common.data.packing import RowPlans

FINGERPRINT_BYTES = 16
NO_EXAMPLES = np.zeros(0, np.int64)


class Loader:
    """The batches of one split, of which this process makes its share of rows."""

    def __init__(
        self,
        examples: Examples,
        config: DataConfig,
        plans: RowPlans,
        *,
        share: Sequence[int] | None = None,
    ) -> None:
        """`share`: which of a batch's rows this process makes, by number; None: all."""
        self._examples = examples
        self._plans = plans
        self._rows = config.rows
        self._lengths = (config.input_length, config.target_length)
        self._share = range(config.rows) if share is None else share

    @property
    def content(self) -> str:
        """What the stream is read from; a chain of fingerprints starts here."""
        return self._examples.content

    def batch(self, step: int) -> HostBatch:
        """This process's share of rows `step * data.rows` to `(step + 1) * data.rows`."""
        return self._build([self._plans.row(step * self._rows + number) for number in self._share])

    def iterate(self, start: int, stop: int, *, threads: int = 1, buffered: int = 4) -> Iterator[HostBatch]:
        """The batches of steps `start` to `stop - 1`, made ahead of time by `threads` threads (0: when asked for).

        At most `buffered` batches wait. Neither number changes what comes out.
        """
        return prefetched(self.batch, start, stop, threads=threads, buffered=buffered)

    def landmarks(self, step: int) -> tuple[int, ...]:
        """Returns what `recall` needs to resume from `step` (1 or more) without planning the steps before it."""
        return self._plans.landmark(step * self._rows - 1)

    def recall(self, landmarks: Sequence[int]) -> None:
        """Takes what `landmarks` of a loader of the same stream returned."""
        if landmarks:
            self._plans.recall(*landmarks)

    def read(self, steps: int) -> tuple[int, np.ndarray]:
        """(how many examples lie in the windows that the first `steps` steps read from, the numbers of those among them
        that stand in later rows, ascending)."""
        window, last = self._plans.locate(steps * self._rows - 1)
        later = range(last + 1, len(self._plans.plan(window)))
        numbers = [NO_EXAMPLES, *(self._plans.numbers(window, row) for row in later)]
        return (window + 1) * self._examples.window, np.sort(np.concatenate(numbers))

    def validation_batches(self, limit: int | None = None) -> Iterator[HostBatch]:
        """Each row of the first window once, in the same order every time; at most `limit` batches.

        The last batch is filled up with empty rows: segments 0, weights 0, nothing counted or hashed.
        """
        plan = self._plans.plan(0)
        batches = -(-len(plan) // self._rows)
        for first in range(0, batches if limit is None else min(batches, limit)):
            rows = (first * self._rows + number for number in self._share)
            yield self._build([self._plans.numbers(0, row) if row < len(plan) else NO_EXAMPLES for row in rows])

    def filled(self) -> tuple[int, LengthSums]:
        """(rows of the first window, what their examples hold): how much of the slots is padding."""
        plan = self._plans.plan(0)
        lengths = self._examples.lengths(np.concatenate([self._plans.numbers(0, row) for row in range(len(plan))]))
        return len(plan), LengthSums.of_examples(*lengths)

    def _build(self, rows: Sequence[np.ndarray]) -> HostBatch:
        return build_batch(self._examples, rows, input_length=self._lengths[0], target_length=self._lengths[1])


def prefetched(
    batch: Callable[[int], HostBatch], start: int, stop: int, *, threads: int, buffered: int
) -> Iterator[HostBatch]:
    """`batch(start)` to `batch(stop - 1)`, made ahead of time as `Loader.iterate` says."""
    steps = grain.MapDataset.range(start, stop).map(batch)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffered, threads))
    # Batches are whole before anything is prefetched: batching later would depend on the number of workers.
    yield from steps.to_iter_dataset(options)


def build_batch(examples: Examples, rows: Sequence[np.ndarray], *, input_length: int, target_length: int) -> HostBatch:
    """A batch of the given rows, each an array of the numbers of examples that fit it (maybe none).

    The layout is `Batch`'s; two examples in one row, with start id 0 and eos 1:

    >>> import types
    >>> from common.data.examples import RecordExamples
    >>> from common.data.objectives.config import Supervised
    >>> from common.data.tokenized.token_store import TokenStream
    >>> ids = types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash="")
    >>> records = {"inputs": TokenStream.of([[7, 8], [9]]), "targets": TokenStream.of([[5], [6]])}
    >>> objective = Supervised(eos_after_inputs=False)
    >>> examples = RecordExamples(records, objective=objective, seed=0, tokenizer=ids, source_content_id="")
    >>> batch = build_batch(examples, [np.array([0, 1])], input_length=4, target_length=5).batch
    >>> for field in dataclasses.fields(batch):
    ...     print(f"{field.name:19}", *getattr(batch, field.name)[0].astype(int))
    inputs_BI           7 8 9 0
    input_segments_BI   1 1 2 0
    input_positions_BI  0 1 0 0
    decoder_inputs_BT   0 5 0 6 0
    targets_BT          5 1 6 1 0
    target_segments_BT  1 1 2 2 0
    target_positions_BT 2 3 1 2 0
    weights_BT          1 1 1 1 0
    """
    made = examples.make(np.concatenate([NO_EXAMPLES, *rows]))
    counts_B = np.array([len(row) for row in rows], np.int64)
    inputs, targets, weights_P = _sides(made, counts_B, input_length, target_length)
    tokenizer = examples.tokenizer
    batch = _lay_out(inputs, targets, weights_P, tokenizer.pad_id, np.full(len(made), tokenizer.start_id, np.int32))
    return HostBatch(
        batch=batch,
        fingerprint=sum(_row_hashes(examples.content, rows, inputs, targets, weights_P)) % 2 ** (8 * FINGERPRINT_BYTES),
        examples=len(made),
        length_sums=LengthSums.of_examples(inputs.lengths_N, targets.lengths_N),
        loss_tokens=int(np.count_nonzero(weights_P)),
    )


def lay_out(
    rows: Sequence[Sequence[Example]],
    *,
    pad_id: int,
    starts: Sequence[Sequence[int]],
    input_length: int,
    target_length: int,
) -> Batch:
    """A batch of the given rows of examples, each with the token that its shifted targets start with."""
    made = [example for row in rows for example in row]
    counts_B = np.array([len(row) for row in rows], np.int64)
    sides = _sides(made, counts_B, input_length, target_length)
    return _lay_out(*sides, pad_id, np.array([start for row in starts for start in row], np.int32))


def chain(previous: str, fingerprint: int) -> str:
    """Adds the fingerprint of one more applied batch to a run's: hexadecimal, 128 bits, dependent on the order.

    `previous` is the chain so far; the first is the stream's `content`.

    >>> chain(chain("content", 1), 2) == chain(chain("content", 2), 1)
    False
    """
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    digest.update(previous.encode())
    digest.update(fingerprint.to_bytes(FINGERPRINT_BYTES, "little"))
    return digest.hexdigest()


def _sides(
    made: Sequence[Example], counts_B: np.ndarray, input_length: int, target_length: int
) -> tuple["_Side", "_Side", np.ndarray]:
    """Inputs, targets and the targets' weights [P], `counts_B` examples a row."""
    inputs = _Side.of([e.inputs_I for e in made], counts_B, input_length)
    targets = _Side.of([e.targets_T for e in made], counts_B, target_length)
    return inputs, targets, np.concatenate([np.zeros(0, np.float32), *(e.weights_T for e in made)])


def _lay_out(inputs: "_Side", targets: "_Side", weights_P: np.ndarray, pad: int, starts_N: np.ndarray) -> Batch:
    zero = 0
    continued_P = targets.within_P + np.repeat(inputs.lengths_N, targets.lengths_N)
    return Batch(
        inputs_BI=inputs.lay(inputs.tokens_P, pad),
        input_segments_BI=inputs.lay(inputs.segments_P, zero),
        input_positions_BI=inputs.lay(inputs.within_P, zero),
        decoder_inputs_BT=targets.lay(targets.shifted_right(starts_N), pad),
        targets_BT=targets.lay(targets.tokens_P, pad),
        target_segments_BT=targets.lay(targets.segments_P, zero),
        target_positions_BT=targets.lay(continued_P, zero),
        weights_BT=targets.lay(weights_P, zero, np.float32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Side:
    """The inputs, or the targets, of a batch's examples, and where each token stands in the rows."""

    rows: int
    width: int
    lengths_N: np.ndarray
    tokens_P: np.ndarray
    within_P: np.ndarray
    """Of each token, its index within its example."""
    segments_P: np.ndarray
    slots_P: np.ndarray
    """Of each token, its slot in the flattened rows."""
    row_bounds: np.ndarray
    """[B+1]: the tokens of row b are those from `row_bounds[b]` up to `row_bounds[b+1]`."""

    @classmethod
    def of(cls, arrays: list[np.ndarray], counts_B: np.ndarray, width: int) -> "_Side":
        """`counts_B` examples a row; rows are `width` slots wide."""
        rows = len(counts_B)
        lengths_N = np.array([len(a) for a in arrays], np.int64)
        ends_N = np.cumsum(lengths_N)
        begins_N = ends_N - lengths_N
        first_B = np.cumsum(counts_B) - counts_B
        row_bounds = np.concatenate([[0], ends_N])[np.append(first_B, len(arrays))]
        assert (np.diff(row_bounds) <= width).all(), "the plan overfills a row"
        row_N = np.repeat(np.arange(rows), counts_B)
        segments_N = np.arange(len(arrays)) - first_B[row_N] + 1
        index_P = np.arange(lengths_N.sum())
        return cls(
            rows=rows,
            width=width,
            lengths_N=lengths_N,
            tokens_P=np.concatenate([np.zeros(0, np.int32), *arrays]),
            within_P=index_P - np.repeat(begins_N, lengths_N),
            segments_P=np.repeat(segments_N, lengths_N),
            slots_P=index_P + np.repeat(row_N * width - row_bounds[row_N], lengths_N),
            row_bounds=row_bounds,
        )

    def lay(self, values_P: np.ndarray, empty: int, dtype: type[np.generic] = np.int32) -> np.ndarray:
        """[B, width]: each value in its token's slot, `empty` elsewhere."""
        out = np.full(self.rows * self.width, empty, dtype)
        out[self.slots_P] = values_P
        return out.reshape(self.rows, self.width)

    def shifted_right(self, starts_N: np.ndarray) -> np.ndarray:
        """[P]: each example's tokens moved up by one behind its start token, the last dropped."""
        shifted_P = np.roll(self.tokens_P, 1)
        shifted_P[self.within_P == 0] = starts_N[self.lengths_N > 0]
        return shifted_P


def _row_hashes(
    content: str, rows: Sequence[np.ndarray], inputs: _Side, targets: _Side, weights_P: np.ndarray
) -> Iterator[int]:
    """One hash a row that holds examples, of all that the loss depends on; lengths go first, so nothing can slide."""
    seeded = hashlib.blake2b(content.encode(), digest_size=FINGERPRINT_BYTES)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    for b, row in enumerate(rows):
        if not len(row):
            continue
        of_row = slice(starts[b], starts[b + 1])
        input_tokens = slice(inputs.row_bounds[b], inputs.row_bounds[b + 1])
        target_tokens = slice(targets.row_bounds[b], targets.row_bounds[b + 1])
        digest = seeded.copy()
        numbers = [np.array([len(row)]), row, inputs.lengths_N[of_row], targets.lengths_N[of_row]]
        digest.update(np.concatenate(numbers).astype("<i8").tobytes())
        digest.update(inputs.tokens_P[input_tokens].astype("<i4").tobytes())
        digest.update(targets.tokens_P[target_tokens].astype("<i4").tobytes())
        digest.update(weights_P[target_tokens].astype("<f4").tobytes())
        yield int.from_bytes(digest.digest(), "little")
