"""Sums of example lengths: all that a transformer's FLOP formulas need to know of the text.

A layer's cost is a polynomial in an example's input length `n_i` and target length `n_t`: linear in the dense layers,
quadratic in attention. The cost of any set of examples therefore needs five sums. The same formula counts padded rows
(each row is one "example" that fills its slots) and useful text (each example with its own lengths).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthSums:
    """Sums over examples of `n_i`, `n_t` (tokens), `n_i^2`, `n_t^2` and `n_i * n_t` (tokens squared)."""

    inputs: int = 0
    targets: int = 0
    inputs_squared: int = 0
    targets_squared: int = 0
    inputs_times_targets: int = 0

    @classmethod
    def of_examples(cls, input_lengths: np.ndarray, target_lengths: np.ndarray) -> "LengthSums":
        """Sums over examples with these lengths: two integer arrays of the same shape, in tokens.

        >>> LengthSums.of_examples(np.array([3, 0]), np.array([1, 2])).targets_squared
        5
        """
        n_i, n_t = np.asarray(input_lengths, np.int64), np.asarray(target_lengths, np.int64)
        return cls(
            inputs=int(n_i.sum()),
            targets=int(n_t.sum()),
            inputs_squared=int((n_i * n_i).sum()),
            targets_squared=int((n_t * n_t).sum()),
            inputs_times_targets=int((n_i * n_t).sum()),
        )

    @classmethod
    def of_rows(cls, rows: int, input_length: int, target_length: int) -> "LengthSums":
        """Sums over `rows` padded rows of `input_length` + `target_length` slots: what the hardware computes.

        >>> LengthSums.of_rows(2, 3, 4)
        LengthSums(inputs=6, targets=8, inputs_squared=18, targets_squared=32, inputs_times_targets=24)
        """
        return cls.of_examples(np.full(rows, input_length), np.full(rows, target_length))

    def __add__(self, other: "LengthSums") -> "LengthSums":
        return LengthSums(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    @property
    def tokens(self) -> int:
        return self.inputs + self.targets
