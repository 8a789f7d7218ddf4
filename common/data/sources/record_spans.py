"""Reads records of a file by seeking to where they start."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.data.sources.records import too_long_reason


def read_spans(
    path: Path, starts: np.ndarray, positions: Sequence[int], torn: str = ""
) -> Iterator[tuple[int, bytes | str]]:
    """Yields (position, bytes) of each record, or (position, reason) of one that is not read.

    Consecutive positions are read without another seek.

    Args:
      path: the file; it is opened for each call, so threads and processes can share it.
      starts: int64; record i is bytes starts[i] to starts[i + 1].
      positions: numbers of the records in the file, in any order.
      torn: the reason for a last record that has a start, but no end.
    """
    with open(path, "rb") as file:
        for low, high in consecutive_runs(positions):
            bounds = starts[low : high + 1].tolist()
            file.seek(bounds[0])
            for position, (begin, end) in enumerate(itertools.pairwise(bounds), low):
                if reason := too_long_reason(end - begin):
                    yield position, reason
                    file.seek(end)
                else:
                    yield position, file.read(end - begin)
            if high == len(starts):
                yield high - 1, torn


def consecutive_runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields (first, last + 1) for each run of consecutive numbers.

    >>> list(consecutive_runs([4, 5, 6, 6, 1]))
    [(4, 7), (6, 7), (1, 2)]
    """
    low = 0
    for at in range(1, len(positions) + 1):
        if at == len(positions) or positions[at] != positions[at - 1] + 1:
            yield positions[low], positions[at - 1] + 1
            low = at
