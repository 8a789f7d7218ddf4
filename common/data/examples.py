"""An infinite, indexable sequence of examples: the lengths and the tokens of example n, for any n.

An example follows from its number alone, and so do its random draws: a text that returns in a later epoch is corrupted
anew. Four index spaces lie between a batch and its source. Each has one word, here and in plans, batches and tokens:

    word    counts                                      range           how to reach it
    row     packed rows of the stream, over all epochs  0, 1, 2, ...    in step r // B, for B rows a step
    number  examples, over all epochs                   0, 1, 2, ...    `RowPlans.row(row)`: the numbers in a row
    index   examples within one epoch                   0 to size - 1   number % size; the epoch is number // size
    place   tokenised records, or pieces of text        0 to size - 1   `Order.place(number)`: the index, or a shuffle

A record that cannot be used has no place; `Prepared.source_record` maps a place to the source's own record. Example n
of a mixture is an example of one part, and has another number there, which `common.data.mixed_examples` works out.

An example's origin says what was read, whatever was made of it. It is four numbers: a hash of the source, the epoch,
and either (record, 1) or, for a piece of text, (its first token in the joined text, its tokens). Its hash with those of
the row's other examples is the row's source fingerprint.

Legend: E examples, L tokens of a piece, 4 the numbers of an origin.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from common.data.objectives import apply as objectives
from common.data.objectives.apply import Example, SpecialIds
from common.data.objectives.config import CausalLM, FullLM, PrefixLM, RawText, Supervised
from common.data.objectives.draws import shuffled
from common.data.objectives.spans import SHORTEST_PIECE
from common.data.tokenized.token_store import TokenStream

PLANNED_TOGETHER = 1 << 20
"""The largest epoch that one packing plan covers. The plan shuffles it; larger epochs are shuffled by a formula, which
keeps memory small."""
WINDOW = 1 << 17
"""Examples in a plan where an epoch is larger than that."""


class Examples(Protocol):
    """An infinite sequence of examples. Equal `content` means equal examples, in every arm of a comparison."""

    tokenizer: SpecialIds
    content: str
    """Describes source, tokenizer and objective; seeds fingerprints."""
    size: int
    """Examples an epoch."""
    window: int
    """Consecutive examples that one packing plan covers."""
    together: int
    """This many consecutive examples always share a row."""

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns input and target lengths, int64 [E] each."""
        ...

    def make(self, number_E: np.ndarray) -> list[Example]:
        """Returns the examples of these numbers, in this order."""
        ...

    def origins(self, number_E: np.ndarray) -> np.ndarray:
        """Returns each example's origin, int64 [E, 4]; it depends on no objective, template or row."""
        ...


@dataclasses.dataclass(frozen=True)
class Order:
    """Maps the numbers of examples to places in a source of `size` places: every epoch visits each place once.

    A small source keeps its order here, since the packing plan of a whole epoch shuffles it; a large one is shuffled.
    """

    size: int
    seed: int
    mixed: bool = False
    """Shuffle small sources too: no plan covers an epoch of a mixture's part."""

    @property
    def window(self) -> int:
        """Examples that one packing plan covers."""
        return self.size if self.size <= PLANNED_TOGETHER else WINDOW

    def place(self, number_E: np.ndarray) -> np.ndarray:
        """Returns the place of each number, int64 [E].

        >>> Order(3, seed=0).place(np.arange(7)).tolist()
        [0, 1, 2, 0, 1, 2, 0]
        >>> Order(3, seed=0, mixed=True).place(np.arange(9)).reshape(3, 3).tolist()
        [[2, 1, 0], [0, 2, 1], [2, 0, 1]]
        """
        epoch_E, index_E = np.divmod(number_E, self.size)
        if self.size <= PLANNED_TOGETHER and not self.mixed:
            return index_E
        return shuffled(index_E, self.size, self.seed, epoch_E)


def same_record(place_E: np.ndarray) -> np.ndarray:
    """Maps places to records where every record of a source can be used."""
    return place_E


class RecordExamples:
    """One example for each record; a place is a record.

    Two templates make other tokens of the same records; an example's origin stays the same. In the second epoch, the
    origin has another epoch:

    >>> import types
    >>> ids = types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash="")
    >>> def examples(inputs):
    ...     records = {"inputs": TokenStream.of(inputs), "targets": TokenStream.of([[5], [6]])}
    ...     return RecordExamples(
    ...         records, objective=Supervised(), seed=0, tokenizer=ids, source_content_id="a.tsv", records_id="a.tsv"
    ...     )
    >>> short, long = examples([[7], [8]]), examples([[9, 9, 7], [9, 9, 8]])
    >>> (short.origins(np.arange(4)) == long.origins(np.arange(4))).all(), short.origins(np.arange(4))[:, 1:].tolist()
    (np.True_, [[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]])
    """

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
        records_id: str | None = None,
        source_records: Callable[[np.ndarray], np.ndarray] = same_record,
    ) -> None:
        """Makes an example of each record.

        Args:
          records: the token ids of every field that the objective reads.
          mixed: the examples are part of a mixture.
          records_id: names the source's records, whichever of their fields are read; None: `source_content_id`.
          source_records: maps places to the source's own records.
        """
        self._records = {field: records[field] for field in objectives.fields(objective)}
        self._objective, self.tokenizer = objective, tokenizer
        self.size = len(next(iter(self._records.values())))
        self.order = Order(self.size, seed, mixed)
        self.window = self.order.window
        self.content = content_of(source_content_id, tokenizer, objective)
        self._origin, self._source_records = records_id or source_content_id, source_records

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place_E = self.order.place(number_E)
        lengths = {field: stream.lengths(place_E) for field, stream in self._records.items()}
        return objectives.record_lengths(self._objective, lengths)

    def make(self, number_E: np.ndarray) -> list[Example]:
        return [
            objectives.example_of_record(
                self._objective,
                {field: stream[place] for field, stream in self._records.items()},
                self.tokenizer.eos_id,
            )
            for place in self.order.place(number_E).tolist()
        ]

    def origins(self, number_E: np.ndarray) -> np.ndarray:
        record_E = self._source_records(self.order.place(number_E))
        return origins_of(self._origin, number_E // self.size, record_E, np.ones_like(record_E))


class PieceExamples:
    """One example for each piece of text: all records are joined end to end and cut into pieces of equal length.

    Place p holds tokens p * piece to (p + 1) * piece - 1 of the joined text. A shorter last piece is an example too,
    unless it is too short for the objective. Complementary pairs take whole pieces only, and an even count of them:
    examples 2n and 2n + 1 are a pair, share a row (`together`) and lie in one window.

    Ten tokens in pieces of four are three places; number 5 is index 2 of epoch 1:

    >>> import types
    >>> from common.data.objectives.config import FullLM
    >>> ids = types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash="")
    >>> text = TokenStream.of([[10, 11, 12, 13, 14, 15], [16, 17, 18, 19]])
    >>> examples = PieceExamples(text, piece=4, objective=FullLM(), seed=0, tokenizer=ids, source_content_id="")
    >>> examples.size, examples.lengths(np.array([0, 1, 2, 5]))[1].tolist()
    (3, [4, 4, 2, 2])
    >>> [example.targets_T.tolist() for example in examples.make(np.array([1, 5]))]
    [[14, 15, 16, 17], [18, 19]]
    >>> examples.origins(np.array([1, 5]))[:, 1:].tolist()  # epoch, first token, tokens
    [[0, 4, 4], [1, 8, 2]]
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
        ended: bool = False,
        paired: bool = False,
    ) -> None:
        """Cuts `text` into pieces of `piece` tokens.

        Args:
          mode: token ids that begin every example's inputs.
          mixed: the examples are part of a mixture.
          ended: eos ends every record in `text`, as another arm's `full_lm` wants it.
          paired: keeps pairs together, as another arm's complementary pairs want it.
        """
        self._text, self._piece, self._objective, self._seed = text, piece, objective, seed
        self._mode, self.tokenizer = tuple(mode), tokenizer
        pairs = paired or (isinstance(objective, PrefixLM) and objective.complementary)
        self.together = 2 if pairs else 1
        whole, rest = divmod(text.tokens, piece)
        self.size = whole // 2 * 2 if pairs else whole + (rest >= SHORTEST_PIECE)
        self.order = Order(self.size, seed, mixed)
        self.window = self.order.window // self.together * self.together
        cut = f"{source_content_id}{' with eos' if ended else ''} in {piece}s"
        self.content = content_of(cut, tokenizer, objective, self._mode)
        # Tokens are counted in the joined text, which depends on the tokenizer and on what ends each record.
        joined = [source_content_id, tokenizer.content_hash, ended or isinstance(objective, FullLM)]
        self._origin = json.dumps(joined)

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs_E, targets_E = objectives.text_lengths(
            self._objective,
            self._lengths(self.order.place(number_E)),
            seed=self._seed,
            number_E=number_E,
            ids=self.tokenizer,
        )
        return inputs_E + len(self._mode), targets_E

    def make(self, number_E: np.ndarray) -> list[Example]:
        place_E = self.order.place(number_E)
        begin_E = place_E * self._piece
        bounds = zip(begin_E.tolist(), (begin_E + self._lengths(place_E)).tolist(), strict=True)
        return objectives.examples_of_texts(
            self._objective,
            [self._text.slice(begin, end) for begin, end in bounds],
            seed=self._seed,
            number_E=number_E,
            ids=self.tokenizer,
            mode=self._mode,
        )

    def origins(self, number_E: np.ndarray) -> np.ndarray:
        place_E = self.order.place(number_E)
        return origins_of(self._origin, number_E // self.size, place_E * self._piece, self._lengths(place_E))

    def _lengths(self, place_E: np.ndarray) -> np.ndarray:
        """Returns the tokens of each piece: all are equal but perhaps the last one."""
        return np.minimum(self._piece, self._text.tokens - place_E * self._piece)


def origins_of(source: str, epoch_E: np.ndarray, first_E: np.ndarray, count_E: np.ndarray) -> np.ndarray:
    """Returns origins, int64 [E, 4]; `source` is hashed to a number that fits an int64."""
    hashed = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=7).digest(), "little")
    return np.stack([np.full_like(first_E, hashed), epoch_E, first_E, count_E], axis=1)


def content_of(source: str, tokenizer: SpecialIds, objective: object, mode: Sequence[int] = ()) -> str:
    """Returns the `content` of examples."""
    identity = {
        "source": source,
        "tokenizer": tokenizer.content_hash,
        "objective": dataclasses.asdict(objective),  # type: ignore[call-overload]
    }
    if mode:
        identity["mode"] = list(mode)
    return json.dumps(identity, sort_keys=True)
