"""Joint plans: arms of one study that differ in objective, template or row length read the same source examples.

Each arm's `DataConfig.joint` names how the others read the source. What is an example, and when two are the same:

    the arms' objectives                     an example is
    all over whole records                   a record: `supervised` with any fields and templates, and `causal_lm`
    all over pieces of text                  a piece of the joined text, as long as the shortest of the arms' own pieces
    some over records, some over pieces      a record, whose whole text the objectives over pieces take as one piece

So the text of every arm is joined with an eos after each record if one arm is a `full_lm`, and pieces stay in pairs if
one arm cuts complementary pairs. All arms skip a record that does not fit a row of one of them, or whose text is longer
than a piece of one of them.

Example n has the same place in every arm. Which examples share a row is then planned once for all, from the greatest
length of each example over the arms (`JointLengths`): a row that has room for these has room for each arm's own. All
arms compute the same plan, and `HostBatch.source_fingerprint` proves it. Padding differs between arms.

Refused: mixtures of objectives (`mixture`, `ul2`, `ul2r`), each part of which cuts the text anew; complementary pairs
beside objectives over records; and templates or fields by which other records of the source can be used.

Legend: E examples, 4 the numbers of an origin.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from common.data.config import DataConfig, fitted_needs
from common.data.examples import Examples, Order, content_of, origins_of
from common.data.objectives import apply as objectives
from common.data.objectives.apply import Example, SpecialIds
from common.data.objectives.config import FullLM, PrefixLM, RawText, raw_parts
from common.data.objectives.spans import SHORTEST_PIECE
from common.data.tokenized.token_store import TokenStream
from common.errors import UserError

NEVER_FITS = 1 << 32
"""Length of an example that no arm may read: longer than any row."""
MOST_PARTS = 1 << 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """What is an example in every arm."""

    piece: int | None
    """Tokens of a piece of the joined text; None: each record is an example."""
    ended: bool = False
    """Eos ends every record in the joined text."""
    paired: bool = False
    """Pieces stay in pairs."""


def joint_cut(arms: Sequence[DataConfig]) -> Cut:
    """Returns how the arms (`DataConfig.arms`) cut the source.

    >>> from common.data.config import SentencePieceConfig
    >>> from common.data.sources.config import SourceConfig
    >>> from common.data.objectives.config import SpanCorruption
    >>> source = SourceConfig(name="text:a.txt", inputs=None, targets=None, text="text")
    >>> of = {"source": source, "tokenizer": SentencePieceConfig(sentinels=28), "rows": 8}
    >>> spans = DataConfig(objective=SpanCorruption(), input_length=512, target_length=114, **of)
    >>> whole = DataConfig(objective=FullLM(), input_length=0, target_length=626, **of)
    >>> joint_cut([spans, whole])  # the pieces of span corruption, which are shorter
    Cut(piece=568, ended=True, paired=False)
    """
    parts = [raw_parts(arm.objective) for arm in arms]
    if not all(parts):
        return Cut(piece=None)
    read = [(arm, part.objective) for arm, (part,) in zip(arms, parts, strict=True)]
    return Cut(
        piece=min(fitted_needs(objective, arm.input_length, arm.target_length).piece for arm, objective in read),
        ended=any(isinstance(objective, FullLM) for _, objective in read),
        paired=any(isinstance(objective, PrefixLM) and objective.complementary for _, objective in read),
    )


class TextExamples:
    """One example for each record, by an objective over pieces that takes a record's whole text as one piece.

    >>> import types
    >>> ids = types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash="")
    >>> text = TokenStream.of([[10, 11, 12, 13], [14], [15, 16]])
    >>> examples = TextExamples(
    ...     text, longest=3, objective=FullLM(), seed=0, tokenizer=ids, source_content_id="a", records_id="a",
    ...     source_records=lambda place_E: place_E,
    ... )
    >>> examples.lengths(np.arange(3))[1].tolist() == [NEVER_FITS, NEVER_FITS, 2]  # too long, too short, right
    True
    """

    together = 1

    def __init__(
        self,
        text: TokenStream,
        *,
        longest: int,
        objective: RawText,
        seed: int,
        tokenizer: SpecialIds,
        source_content_id: str,
        records_id: str,
        source_records: Callable[[np.ndarray], np.ndarray],
        mixed: bool = False,
    ) -> None:
        """Makes an example of each record of `SHORTEST_PIECE` to `longest` tokens; the others fit no row.

        Other arguments are those of `RecordExamples`.
        """
        self._text, self._longest, self._objective, self._seed = text, longest, objective, seed
        self.tokenizer = tokenizer
        self.size = len(text)
        self.order = Order(self.size, seed, mixed)
        self.window = self.order.window
        self.content = content_of(f"{source_content_id} in records", tokenizer, objective)
        self._records_id, self._source_records = records_id, source_records

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length_E = self._text.lengths(self.order.place(number_E))
        (fits,) = np.nonzero((length_E >= SHORTEST_PIECE) & (length_E <= self._longest))
        out = np.full(len(number_E), NEVER_FITS), np.full(len(number_E), NEVER_FITS)
        found = objectives.text_lengths(
            self._objective, length_E[fits], seed=self._seed, number_E=number_E[fits], ids=self.tokenizer
        )
        for side_E, lengths in zip(out, found, strict=True):
            side_E[fits] = lengths
        return out

    def make(self, number_E: np.ndarray) -> list[Example]:
        texts = [self._text[place] for place in self.order.place(number_E).tolist()]
        return objectives.examples_of_texts(
            self._objective, texts, seed=self._seed, number_E=number_E, ids=self.tokenizer
        )

    def origins(self, number_E: np.ndarray) -> np.ndarray:
        record_E = self._source_records(self.order.place(number_E))
        return origins_of(self._records_id, number_E // self.size, record_E, np.ones_like(record_E))


class JointLengths:
    """The greatest length of each example, or pair, over several arms, for a plan that fits all of them.

    Lengths are in parts of a row, of which each slot of each arm's rows is a whole number. Here, two arms read three
    records. The second one has a longer template, and rows of 6 + 8 slots instead of 6 + 4, so a target slot of the
    first arm is two parts:

    >>> import types
    >>> from common.data.examples import RecordExamples
    >>> from common.data.objectives.config import Supervised
    >>> from common.data.packing import plan_epoch
    >>> ids = types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash="")
    >>> def examples(*inputs):
    ...     records = {"inputs": TokenStream.of(inputs), "targets": TokenStream.of([[7]] * len(inputs))}
    ...     bare = Supervised(eos_after_inputs=False)
    ...     return RecordExamples(records, objective=bare, seed=0, tokenizer=ids, source_content_id="a")
    >>> short, long = examples([5], [6], [7]), examples([9, 9, 9, 5], [9, 6], [9, 9, 7])
    >>> joint = JointLengths([short, long], [(6, 4), (6, 8)])
    >>> joint.limits, [side.tolist() for side in joint.lengths(np.arange(3))]
    ((6, 8), [[4, 2, 3], [4, 4, 4]])

    The first arm alone has room for all three records in one row; jointly, only records 0 and 1 can share a row:

    >>> plan = plan_epoch(*joint.lengths(np.arange(3)), input_limit=6, target_limit=8, seed=0, epoch=0)
    >>> sorted(sorted(plan.row(row).tolist()) for row in range(len(plan)))
    [[0, 1], [2]]
    """

    def __init__(self, arms: Sequence[Examples], limits: Sequence[tuple[int, int]]) -> None:
        """`limits` holds (input slots, target slots) of each arm's rows.

        Raises UserError if the arms have different examples.
        """
        self._arms, self._arm_limits = arms, limits
        self.limits = _common(limit for limit, _ in limits), _common(limit for _, limit in limits)
        """(input, target) parts of a row."""
        self.shown = "a row of one arm (" + " or ".join(f"{i} + {t}" for i, t in dict.fromkeys(limits)) + " slots)"
        """Describes a row in messages."""
        self.window, self.together = arms[0].window, arms[0].together
        sizes = [arm.size for arm in arms]
        if len(set(sizes)) > 1:
            self._refuse(f"{' and '.join(f'{size:,}' for size in sizes)} examples")

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns joint input and target lengths, int64 [E] each; those of a pair are its sums, then 0.

        Raises UserError if the arms read different records.
        """
        joint = np.zeros((2, len(number_E) // self.together), np.int64)
        origins_E4 = self._arms[0].origins(number_E)
        for arm, limits in zip(self._arms, self._arm_limits, strict=True):
            if not np.array_equal(arm.origins(number_E), origins_E4):
                self._refuse("different records")
            for side, (own_E, slots, parts) in enumerate(zip(arm.lengths(number_E), limits, self.limits, strict=True)):
                sums = own_E.reshape(-1, self.together).sum(axis=1)
                joint[side] = np.maximum(joint[side], _in_parts(sums, slots, parts))
        inputs_E, targets_E = np.zeros((2, len(number_E)), np.int64)
        inputs_E[:: self.together], targets_E[:: self.together] = joint
        return inputs_E, targets_E

    def _refuse(self, what: str) -> None:
        raise UserError(
            f"the arms of data.joint read {what} of the source: by the fields or templates of one of them, some "
            "records cannot be used, or other files are read; nearest: fields and templates by which all can be used"
        )


def _common(slots: Iterable[int]) -> int:
    """Returns how many parts a row has: the least common multiple of its slots in the arms, 0 if no arm has any.

    Raises UserError if it is too large to count with.
    """
    parts = math.lcm(*{n for n in slots if n} or {0})
    if parts > MOST_PARTS:
        raise UserError(
            "the row lengths of the arms of data.joint have a huge common multiple; nearest: lengths that divide one"
        )
    return parts


def _in_parts(length_E: np.ndarray, slots: int, parts: int) -> np.ndarray:
    """Returns lengths in slots of a row as lengths in its parts; what exceeds the row still does."""
    if not slots:
        return np.where(length_E > 0, parts + 1, 0)
    return np.minimum(length_E, slots + 1) * (parts // slots)
