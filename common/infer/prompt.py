"""Prompts in rows, padded to few lengths."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.data.batch import Prompt

SMALLEST_BUCKET = 16


def pad_prompts(
    inputs: Sequence[np.ndarray], starts: Sequence[int], *, rows: int, written: Sequence[Sequence[int]] | None = None
) -> Prompt:
    """NumPy arrays of `rows` rows, wide enough for the longest input's bucket; missing rows are empty.

    `written` are each row's decoder inputs before its start; None: there are none.
    """
    assert 0 < len(inputs) == len(starts) <= rows
    inputs_BI, lengths_B = _padded(inputs, rows)
    starts_B = np.zeros(rows, np.int32)
    starts_B[: len(starts)] = starts
    before: dict[str, Any] = {}
    if written is not None and any(map(len, written)):
        before["written_BW"], before["written_lengths_B"] = _padded(written, rows)
    return Prompt(inputs_BI=inputs_BI, lengths_B=lengths_B, starts_B=starts_B, **before)  # type: ignore[arg-type]


def _padded(sequences: Sequence[Sequence[int] | np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [rows, bucket of the longest], lengths)."""
    padded, lengths = np.zeros((rows, bucket(max(map(len, sequences)))), np.int32), np.zeros(rows, np.int32)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)], lengths[row] = tokens, len(tokens)
    return padded, lengths


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... that holds `length`: programs are compiled for these alone.

    >>> [bucket(n) for n in (0, 17, 32, 33, 100)]
    [16, 24, 32, 48, 128]
    """
    size = SMALLEST_BUCKET
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size
