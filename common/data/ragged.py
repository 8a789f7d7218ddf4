"""Many token sequences of different lengths in two arrays.

Legend: P tokens of all sequences in a row, E sequences.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """Many arrays of token ids end to end."""

    tokens_P: np.ndarray
    """int32."""
    offsets: np.ndarray
    """int64 [E+1]: array i is `tokens_P[offsets[i]:offsets[i+1]]`."""

    @classmethod
    def of(cls, arrays: Iterable[Iterable[int]]) -> "Ragged":
        """From lists of ids.

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
