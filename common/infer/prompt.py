"""Pads prompts to rows of a few lengths, so that few programs are compiled."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.data.batch import Prompt

SMALLEST_BUCKET = 16


def pad_prompts(
    inputs: Sequence[np.ndarray], starts: Sequence[int], *, rows: int, written: Sequence[Sequence[int]] | None = None
) -> Prompt:
    """Returns NumPy arrays of `rows` rows, as wide as the bucket of the longest input; extra rows are empty.

    `written` holds each row's decoder inputs before its start; None if there are none.
    """
    assert 0 < len(inputs) == len(starts) <= rows
    inputs_BI, lengths_B = _pad(inputs, rows)
    starts_B = np.zeros(rows, np.int32)
    starts_B[: len(starts)] = starts
    before: dict[str, Any] = {}
    if written is not None and any(map(len, written)):
        before["written_BW"], before["written_lengths_B"] = _pad(written, rows)
    return Prompt(inputs_BI=inputs_BI, lengths_B=lengths_B, starts_B=starts_B, **before)  # type: ignore[arg-type]


def _pad(sequences: Sequence[Sequence[int] | np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 [rows, bucket of the longest sequence], and the lengths, int32 [rows]."""
    padded, lengths = np.zeros((rows, bucket(max(map(len, sequences)))), np.int32), np.zeros(rows, np.int32)
    for row, tokens in enumerate(sequences):
        padded[row, : len(tokens)], lengths[row] = tokens, len(tokens)
    return padded, lengths


def bucket(length: int) -> int:
    """Returns the smallest of 16, 24, 32, 48, 64, 96, ... that is at least `length`.

    >>> [bucket(n) for n in (0, 17, 32, 33, 100)]
    [16, 24, 32, 48, 128]
    """
    size = SMALLEST_BUCKET
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size
