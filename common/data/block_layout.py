"""Lays examples out in the rows of a batch (the block order of `common.data.batch`) and hashes the rows.

Legend: B rows of this process, I input slots, T target slots, N examples of the batch (row after row), P tokens of one
side (inputs or targets) of all N examples, end to end.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from common.compute.length_sums import LengthSums
from common.data.batch import Batch, HostBatch
from common.data.examples import Examples
from common.data.objectives.apply import Example

FINGERPRINT_BYTES = 16
NO_EXAMPLES = np.zeros(0, np.int64)


def build_batch(examples: Examples, rows: Sequence[np.ndarray], *, input_length: int, target_length: int) -> HostBatch:
    """Makes the batch of these rows, each an array with the numbers of the examples that it holds (perhaps none).

    Two examples in one row, with start id 0 and eos 1:

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
    batch = _batch(inputs, targets, weights_P, tokenizer.pad_id, np.full(len(made), tokenizer.start_id, np.int32))
    hashes = _row_hashes(examples.content, rows, inputs, targets, weights_P)
    return HostBatch(
        batch=batch,
        fingerprint=sum(hashes) % 2 ** (8 * FINGERPRINT_BYTES),
        source_fingerprint=sum(_source_hashes(examples, rows)) % 2 ** (8 * FINGERPRINT_BYTES),
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
    """Makes the batch of these rows of examples. `starts` holds each example's start token, row by row."""
    made = [example for row in rows for example in row]
    counts_B = np.array([len(row) for row in rows], np.int64)
    sides = _sides(made, counts_B, input_length, target_length)
    return _batch(*sides, pad_id, np.array([start for row in starts for start in row], np.int32))


def _sides(
    made: Sequence[Example], counts_B: np.ndarray, input_length: int, target_length: int
) -> tuple["_Side", "_Side", np.ndarray]:
    """Returns inputs, targets and the targets' weights [P]; row b holds the next `counts_B[b]` examples."""
    inputs = _Side.of([e.inputs_I for e in made], counts_B, input_length)
    targets = _Side.of([e.targets_T for e in made], counts_B, target_length)
    return inputs, targets, np.concatenate([np.zeros(0, np.float32), *(e.weights_T for e in made)])


def _batch(inputs: "_Side", targets: "_Side", weights_P: np.ndarray, pad: int, starts_N: np.ndarray) -> Batch:
    continued_P = targets.within_P + np.repeat(inputs.lengths_N, targets.lengths_N)
    return Batch(
        inputs_BI=inputs.in_rows(inputs.tokens_P, pad),
        input_segments_BI=inputs.in_rows(inputs.segments_P, 0),
        input_positions_BI=inputs.in_rows(inputs.within_P, 0),
        decoder_inputs_BT=targets.in_rows(targets.shifted_right(starts_N), pad),
        targets_BT=targets.in_rows(targets.tokens_P, pad),
        target_segments_BT=targets.in_rows(targets.segments_P, 0),
        target_positions_BT=targets.in_rows(continued_P, 0),
        weights_BT=targets.in_rows(weights_P, 0, np.float32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Side:
    """The inputs, or the targets, of a batch's examples, and the slot of every token.

    Rows (B), examples (N) and tokens (P) are each counted from 0 through the whole batch. Here row 0 holds two
    examples, [7, 8] and [9], and row 1 holds one, [5]; rows are 4 slots wide, so row 1 begins at slot 4:

    >>> arrays = [np.array([7, 8], np.int32), np.array([9], np.int32), np.array([5], np.int32)]
    >>> side = _Side.of(arrays, counts_B=np.array([2, 1]), width=4)
    >>> for name in ("lengths_N", "tokens_P", "within_P", "segments_P", "slots_P", "row_bounds"):
    ...     print(f"{name:10}", *getattr(side, name))
    lengths_N  2 1 1
    tokens_P   7 8 9 5
    within_P   0 1 0 0
    segments_P 1 1 2 1
    slots_P    0 1 2 4
    row_bounds 0 3 4
    >>> side.in_rows(side.tokens_P, empty=0).tolist()
    [[7, 8, 9, 0], [5, 0, 0, 0]]
    >>> side.shifted_right(starts_N=np.array([91, 92, 93])).tolist()
    [91, 7, 92, 93]
    """

    rows: int
    width: int
    """Slots a row."""
    lengths_N: np.ndarray
    tokens_P: np.ndarray
    within_P: np.ndarray
    """The position of each token in its example."""
    segments_P: np.ndarray
    """The segment of each token: which example of its row it belongs to, counted from 1."""
    slots_P: np.ndarray
    """The slot of each token in the flattened rows."""
    row_bounds: np.ndarray
    """[B+1]: row b holds tokens `row_bounds[b]` to `row_bounds[b+1] - 1`."""

    @classmethod
    def of(cls, arrays: list[np.ndarray], counts_B: np.ndarray, width: int) -> "_Side":
        """Computes the slots of the tokens in `arrays` (N of them), where row b holds the next `counts_B[b]` arrays."""
        examples, rows = len(arrays), len(counts_B)
        lengths_N = np.array([len(array) for array in arrays], np.int64)
        first_B = np.cumsum(counts_B) - counts_B  # the first example of each row
        row_N = np.repeat(np.arange(rows), counts_B)
        segments_N = np.arange(examples) - first_B[row_N] + 1
        # [N+1]: example n holds tokens bounds[n] to bounds[n+1] - 1.
        bounds = np.concatenate([[0], np.cumsum(lengths_N)])
        row_bounds = bounds[np.append(first_B, examples)]
        assert (np.diff(row_bounds) <= width).all(), "the plan overfills a row"
        example_P = np.repeat(np.arange(examples), lengths_N)
        token_P, row_P = np.arange(len(example_P)), row_N[example_P]
        return cls(
            rows=rows,
            width=width,
            lengths_N=lengths_N,
            tokens_P=np.concatenate([np.zeros(0, np.int32), *arrays]),
            within_P=token_P - bounds[example_P],
            segments_P=segments_N[example_P],
            slots_P=row_P * width + token_P - row_bounds[row_P],
            row_bounds=row_bounds,
        )

    def in_rows(self, values_P: np.ndarray, empty: int, dtype: type[np.generic] = np.int32) -> np.ndarray:
        """Returns [B, width] with each value in its token's slot, and `empty` elsewhere."""
        out = np.full(self.rows * self.width, empty, dtype)
        out[self.slots_P] = values_P
        return out.reshape(self.rows, self.width)

    def shifted_right(self, starts_N: np.ndarray) -> np.ndarray:
        """Returns [P]: the start token of each example, then its tokens but the last."""
        shifted_P = np.roll(self.tokens_P, 1)
        shifted_P[self.within_P == 0] = starts_N[self.lengths_N > 0]
        return shifted_P


def _row_hashes(
    content: str, rows: Sequence[np.ndarray], inputs: _Side, targets: _Side, weights_P: np.ndarray
) -> Iterator[int]:
    """Yields a hash of each row that holds examples, over everything that the loss depends on.

    Lengths are hashed first, so that equal tokens divided in another way differ.
    """
    seeded = hashlib.blake2b(content.encode(), digest_size=FINGERPRINT_BYTES)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    for b, row in enumerate(rows):
        if not len(row):
            continue
        examples = slice(starts[b], starts[b + 1])
        input_tokens = slice(inputs.row_bounds[b], inputs.row_bounds[b + 1])
        target_tokens = slice(targets.row_bounds[b], targets.row_bounds[b + 1])
        digest = seeded.copy()
        counts = [np.array([len(row)]), row, inputs.lengths_N[examples], targets.lengths_N[examples]]
        digest.update(np.concatenate(counts).astype("<i8").tobytes())
        digest.update(inputs.tokens_P[input_tokens].astype("<i4").tobytes())
        digest.update(targets.tokens_P[target_tokens].astype("<i4").tobytes())
        digest.update(weights_P[target_tokens].astype("<f4").tobytes())
        yield int.from_bytes(digest.digest(), "little")


def _source_hashes(examples: Examples, rows: Sequence[np.ndarray]) -> Iterator[int]:
    """Yields a hash of each row that holds examples, over their origins alone."""
    origins_N4 = examples.origins(np.concatenate([NO_EXAMPLES, *rows])).astype("<i8")
    stop = 0
    for row in rows:
        start, stop = stop, stop + len(row)
        if len(row):
            digest = hashlib.blake2b(origins_N4[start:stop].tobytes(), digest_size=FINGERPRINT_BYTES)
            yield int.from_bytes(digest.digest(), "little")
