"""Token sequences of different lengths, in two arrays.

Legend: P tokens of all sequences end to end, E sequences.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """Arrays of token ids, end to end."""

    tokens_P: np.ndarray
    """int32."""
    offsets: np.ndarray
    """int64 [E+1]: array i is `tokens_P[offsets[i]:offsets[i+1]]`."""

    @classmethod
    def of(cls, arrays: Iterable[Iterable[int]]) -> "Ragged":
        """Makes one from lists of ids.

        >>> Ragged.of([[5, 6], [], [7]])[2].tolist()
        [7]
        """
        parts = [np.array(list(ids), np.int32) for ids in arrays]
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        return cls(tokens_P=np.concatenate([np.zeros(0, np.int32), *parts]), offsets=offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens_P[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [E]."""
        return np.diff(self.offsets)

    def framed(self, before: Sequence[int], after: Sequence[int]) -> "Ragged":
        """Adds the same ids before and after every array.

        >>> [array.tolist() for array in map(Ragged.of([[5, 6], []]).framed([8], [1]).__getitem__, range(2))]
        [[8, 5, 6, 1], [8, 1]]
        """
        added = len(before) + len(after)
        first, last = self.offsets[0], self.offsets[-1]
        offsets = self.offsets - first + added * np.arange(len(self.offsets))
        out_P = np.empty(offsets[-1], np.int32)
        old = np.ones(len(out_P), bool)
        for i, token in enumerate(before):
            out_P[offsets[:-1] + i], old[offsets[:-1] + i] = token, False
        for i, token in enumerate(reversed(after), start=1):
            out_P[offsets[1:] - i], old[offsets[1:] - i] = token, False
        out_P[old] = self.tokens_P[first:last]
        return Ragged(tokens_P=out_P, offsets=offsets)
