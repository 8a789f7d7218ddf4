"""How much text there is to compute on: the sums that every FLOP formula of a transformer needs.

A layer's cost is a polynomial in an example's input length `n_i` and target length `n_t`: linear in the dense layers,
quadratic in attention. So the cost of a whole set of examples needs five sums only, and the same formula counts padded
rows (every row is one "example" that fills its slots) and useful text (every example by itself).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over examples of `n_i`, `n_t`, `n_i^2`, `n_t^2` and `n_i * n_t` (tokens, tokens squared)."""

    inputs: int = 0
    targets: int = 0
    inputs_squared: int = 0
    targets_squared: int = 0
    inputs_times_targets: int = 0

    @classmethod
    def of_examples(cls, input_lengths: np.ndarray, target_lengths: np.ndarray) -> "Moments":
        """From two integer arrays of equal length.

        >>> Moments.of_examples(np.array([3, 0]), np.array([1, 2])).targets_squared
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
    def of_rows(cls, rows: int, input_length: int, target_length: int) -> "Moments":
        """`rows` padded rows of `input_length` + `target_length` slots: what the hardware computes on.

        >>> Moments.of_rows(2, 3, 4)
        Moments(inputs=6, targets=8, inputs_squared=18, targets_squared=32, inputs_times_targets=24)
        """
        return cls.of_examples(np.full(rows, input_length), np.full(rows, target_length))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    @property
    def tokens(self) -> int:
        return self.inputs + self.targets
