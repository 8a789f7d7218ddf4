"""The examples of several parts, interleaved at given rates: a mixture of sources, or of objectives.

Numbers, indices and places are those of the table in `common.data.examples`; a rank counts the examples of a part
within the mixture.

Legend: E examples, 4 the numbers of an origin.
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from common.data.examples import Examples
from common.data.mixing import Mixing
from common.data.objectives.apply import Example

MIXED_WINDOW = 1 << 14
"""Examples in a plan of a mixture."""


class Unread(NamedTuple):
    """The examples of a part that no batch has consumed: first those of `numbers`, then all from number `then` on."""

    numbers: np.ndarray
    """int64."""
    then: int

    def numbers_of(self, rank_E: np.ndarray) -> np.ndarray:
        """Returns the numbers, int64 [E], of the unread examples of these ranks (0 is the first to be read).

        >>> Unread(np.array([4, 7]), 9).numbers_of(np.arange(5)).tolist()
        [4, 7, 9, 10, 11]
        """
        number_E = self.then + rank_E - len(self.numbers)
        (early,) = np.nonzero(rank_E < len(self.numbers))
        number_E[early] = self.numbers[rank_E[early]]
        return number_E


ALL = Unread(np.zeros(0, np.int64), 0)


class MixedExamples:
    """Interleaves the examples of several parts at given rates; each part runs through its own epochs.

    `Mixing` maps a number of the mixture to a part and a rank, which counts the part's examples in the mixture. The
    part's `Unread` maps that rank to a number in the part.
    """

    together = 1
    window = MIXED_WINDOW

    def __init__(
        self, parts: Sequence[Examples], rates: Sequence[float], seed: int, unread: Sequence[Unread] | None = None
    ) -> None:
        """`unread`: the examples of each part that remain; None: all."""
        assert all(part.together == 1 for part in parts)
        self._mixing, self._parts = Mixing(rates=tuple(rates), seed=seed), parts
        self._unread = [ALL] * len(parts) if unread is None else list(unread)
        self.tokenizer = parts[0].tokenizer
        self.size = sum(part.size for part in parts)
        self.content = json.dumps({"parts": [part.content for part in parts], "rates": list(rates)})

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs_E, targets_E = np.empty(len(number_E), np.int64), np.empty(len(number_E), np.int64)
        for part, members, rank_E in self._by_part(number_E):
            numbers = self._unread[part].numbers_of(rank_E)
            inputs_E[members], targets_E[members] = self._parts[part].lengths(numbers)
        return inputs_E, targets_E

    def make(self, number_E: np.ndarray) -> list[Example]:
        out: list[Example | None] = [None] * len(number_E)
        for part, members, rank_E in self._by_part(number_E):
            made = self._parts[part].make(self._unread[part].numbers_of(rank_E))
            for member, example in zip(members.tolist(), made, strict=True):
                out[member] = example
        return [example for example in out if example is not None]

    def origins(self, number_E: np.ndarray) -> np.ndarray:
        out_E4 = np.empty((len(number_E), 4), np.int64)
        for part, members, rank_E in self._by_part(number_E):
            out_E4[members] = self._parts[part].origins(self._unread[part].numbers_of(rank_E))
        return out_E4

    def unread_after(self, end: int, pending_E: np.ndarray) -> list[Unread]:
        """Returns the unread examples of each part after all numbers before `end`, except `pending_E` (ascending), are
        read."""
        pending = {part: rank_E for part, _, rank_E in self._by_part(pending_E)}
        remaining = []
        for part, (unread, read) in enumerate(zip(self._unread, self._mixing.counts(end), strict=True)):
            pending_numbers = unread.numbers_of(pending.get(part, np.zeros(0, np.int64)))
            numbers = np.concatenate([pending_numbers, unread.numbers[read:]])
            remaining.append(Unread(numbers, unread.then + max(0, read - len(unread.numbers))))
        return remaining

    def _by_part(self, number_E: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Groups examples by part, as (part, positions in `number_E`, ranks in the part)."""
        part_E, rank_E = self._mixing.find(number_E)
        groups = []
        for part in np.unique(part_E).tolist():
            (members,) = np.nonzero(part_E == part)
            groups.append((part, members, rank_E[members]))
        return groups
