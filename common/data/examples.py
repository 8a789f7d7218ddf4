"""Examples without end: of any number, what it is made of, how long it is, and itself.

Examples of one source, or of a mixture, are numbered from 0 on through all epochs. What an example is follows from its
number alone, and so do its random draws: a text that comes again in a later epoch is corrupted anew.

Legend: E examples, L tokens of a piece, M a mode's tokens.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from common.data.mixing import Mixing
from common.data.objectives import apply as objectives
from common.data.objectives.apply import Example, SpecialIds
from common.data.objectives.config import CausalLM, PrefixLM, RawText, Supervised
from common.data.objectives.draws import shuffled
from common.data.objectives.spans import SHORTEST_PIECE
from common.data.tokenized.token_store import TokenStream

PLANNED_TOGETHER = 1 << 20
"""A source of more examples is shuffled by a formula instead of by the plan of its rows, so that memory stays small."""
WINDOW = 1 << 17
MIXED_WINDOW = 1 << 14


class Examples(Protocol):
    """Every arm that reads the same `content` reads the same examples."""

    tokenizer: SpecialIds
    content: str
    """What the examples are: source, tokenizer and objective. Fingerprints are seeded with it."""
    size: int
    """Examples an epoch."""
    window: int
    """How many are planned into rows together."""
    together: int
    """Examples whose numbers differ only in the remainder by this share a row."""

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input and target lengths, int64 [E]."""
        ...

    def make(self, number_E: np.ndarray) -> list[Example]: ...


@dataclasses.dataclass(frozen=True)
class Order:
    """Which of `size` things each number stands for: all of them in every epoch.

    Few things come in their own order, since the plan that packs a whole epoch shuffles them; many in a shuffled one.
    """

    size: int
    seed: int
    mixed: bool = False
    """Shuffle in any case: the examples are planned together with others."""

    @property
    def window(self) -> int:
        return self.size if self.size <= PLANNED_TOGETHER else WINDOW

    def place(self, number_E: np.ndarray) -> np.ndarray:
        """int64 [E].

        >>> Order(3, seed=0).place(np.arange(7)).tolist()
        [0, 1, 2, 0, 1, 2, 0]
        """
        epoch_E, within_E = np.divmod(number_E, self.size)
        if self.size <= PLANNED_TOGETHER and not self.mixed:
            return within_E
        return shuffled(within_E, self.size, self.seed, epoch_E)


class RecordExamples:
    """One example a record."""

    together = 1

    def __init__(
        self,
        records: Mapping[str, TokenStream],
        *,
        objective: Supervised | CausalLM,
        seed: int,
        tokenizer: SpecialIds,
        source_content_id: str,
        mixed: bool = False,
    ) -> None:
        """`records` holds the token ids of every field that the objective reads."""
        self._records = {field: records[field] for field in objectives.fields(objective)}
        self._objective, self.tokenizer = objective, tokenizer
        self.size = len(next(iter(self._records.values())))
        self.order = Order(self.size, seed, mixed)
        self.window = self.order.window
        self.content = _content(source_content_id, tokenizer, objective)

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place_E = self.order.place(number_E)
        lengths = {field: stream.lengths(place_E) for field, stream in self._records.items()}
        return objectives.record_lengths(self._objective, lengths)

    def make(self, number_E: np.ndarray) -> list[Example]:
        return [
            objectives.of_record(
                self._objective,
                {field: stream[place] for field, stream in self._records.items()},
                self.tokenizer.eos_id,
            )
            for place in self.order.place(number_E).tolist()
        ]


class PieceExamples:
    """One example a piece of text: all records end to end, cut into pieces of equal length.

    A last piece that is shorter is an example too, unless it is too short for the objective, or lacks its pair.
    """

    def __init__(
        self,
        text: TokenStream,
        *,
        piece: int,
        objective: RawText,
        seed: int,
        tokenizer: SpecialIds,
        source_content_id: str,
        mode: Sequence[int] = (),
        mixed: bool = False,
    ) -> None:
        """`mode` stands before all inputs."""
        self._text, self._piece, self._objective, self._seed = text, piece, objective, seed
        self._mode, self.tokenizer = tuple(mode), tokenizer
        pairs = isinstance(objective, PrefixLM) and objective.complementary
        self.together = 2 if pairs else 1
        whole, rest = divmod(text.tokens, piece)
        self.size = whole // 2 * 2 if pairs else whole + (rest >= SHORTEST_PIECE)
        self.order = Order(self.size, seed, mixed)
        self.window = self.order.window // self.together * self.together
        self.content = _content(f"{source_content_id} in {piece}s", tokenizer, objective, self._mode)

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs_E, targets_E = np.empty(len(number_E), np.int64), np.empty(len(number_E), np.int64)
        for length, members in self._by_length(self.order.place(number_E)):
            inputs_E[members], targets_E[members] = objectives.piece_lengths(
                self._objective, length, seed=self._seed, index_E=number_E[members], ids=self.tokenizer
            )
        return inputs_E + len(self._mode), targets_E

    def make(self, number_E: np.ndarray) -> list[Example]:
        place_E = self.order.place(number_E)
        out: list[Example | None] = [None] * len(number_E)
        for length, members in self._by_length(place_E):
            tokens_EL = np.empty((len(members), length), np.int32)
            for row_L, begin in zip(tokens_EL, (place_E[members] * self._piece).tolist(), strict=True):
                row_L[:] = self._text.slice(begin, begin + length)
            made = objectives.of_pieces(
                self._objective,
                tokens_EL,
                seed=self._seed,
                index_E=number_E[members],
                ids=self.tokenizer,
                mode=self._mode,
            )
            for member, example in zip(members.tolist(), made, strict=True):
                out[member] = example
        return [example for example in out if example is not None]

    def _by_length(self, place_E: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(length, which of the pieces have it): the last piece may be short."""
        length_E = np.minimum(self._piece, self._text.tokens - place_E * self._piece)
        return [(length, np.flatnonzero(length_E == length)) for length in np.unique(length_E).tolist()]


class Unread(NamedTuple):
    """Examples of a part that nothing was made of yet: those of `numbers` come first, then all from `then` on."""

    numbers: np.ndarray
    """int64."""
    then: int


ALL = Unread(np.zeros(0, np.int64), 0)


class MixedExamples:
    """Several kinds of examples by rate; each goes on through its own epochs."""

    together = 1
    window = MIXED_WINDOW

    def __init__(
        self, parts: Sequence[Examples], rates: Sequence[float], seed: int, unread: Sequence[Unread] | None = None
    ) -> None:
        """`unread`: what there is of each part; None: all."""
        assert all(part.together == 1 for part in parts)
        self._mixing, self._parts = Mixing(rates=tuple(rates), seed=seed), parts
        self._unread = [ALL] * len(parts) if unread is None else list(unread)
        self.tokenizer = parts[0].tokenizer
        self.size = sum(part.size for part in parts)
        self.content = json.dumps({"parts": [part.content for part in parts], "rates": list(rates)})

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs_E, targets_E = np.empty(len(number_E), np.int64), np.empty(len(number_E), np.int64)
        for part, members, within in self._split(number_E):
            inputs_E[members], targets_E[members] = part.lengths(within)
        return inputs_E, targets_E

    def make(self, number_E: np.ndarray) -> list[Example]:
        out: list[Example | None] = [None] * len(number_E)
        for part, members, within in self._split(number_E):
            for member, example in zip(members.tolist(), part.make(within), strict=True):
                out[member] = example
        return [example for example in out if example is not None]

    def rest(self, number: int, skipped_E: np.ndarray) -> list[Unread]:
        """The unread rest of each part after the examples before `number`, except `skipped_E` (ascending), are read."""
        skipped = {part: place_E for part, _, place_E in self._by_part(skipped_E)}
        rest = []
        for part, (unread, read) in enumerate(zip(self._unread, self._mixing.counts(number), strict=True)):
            before_E = _numbers(unread, skipped.get(part, np.zeros(0, np.int64)))
            numbers_E = np.concatenate([before_E, unread.numbers[read:]])
            rest.append(Unread(numbers_E, unread.then + max(0, read - len(unread.numbers))))
        return rest

    def _split(self, number_E: np.ndarray) -> list[tuple[Examples, np.ndarray, np.ndarray]]:
        """(part, which of the examples are its, their numbers within it)."""
        split = self._by_part(number_E)
        return [(self._parts[part], members, _numbers(self._unread[part], place_E)) for part, members, place_E in split]

    def _by_part(self, number_E: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(part, which of the examples are its, their places among what is unread of it)."""
        part_E, place_E = self._mixing.find(number_E)
        found = []
        for part in np.unique(part_E).tolist():
            (members,) = np.nonzero(part_E == part)
            found.append((part, members, place_E[members]))
        return found


def _numbers(unread: Unread, place_E: np.ndarray) -> np.ndarray:
    """Numbers within a part, int64 [E], of the examples at these places among its unread ones."""
    number_E = unread.then + place_E - len(unread.numbers)
    (early,) = np.nonzero(place_E < len(unread.numbers))
    number_E[early] = unread.numbers[place_E[early]]
    return number_E


def _content(source: str, tokenizer: SpecialIds, objective: object, mode: Sequence[int] = ()) -> str:
    identity = {
        "source": source,
        "tokenizer": tokenizer.content_hash,
        "objective": dataclasses.asdict(objective),  # type: ignore[call-overload]
    }
    if mode:
        identity["mode"] = list(mode)
    return json.dumps(identity, sort_keys=True)
