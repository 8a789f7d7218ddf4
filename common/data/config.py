"""Configs of what a run reads: source, tokenizer, objective and the shape of its rows.

Configs are checked when they are made, so a wrong value is one clear line before any work starts.
"""

import dataclasses
from typing import Annotated, Literal

from common.compute.length_sums import LengthSums
from common.data.objectives.config import (
    UL2,
    UL2R,
    CausalLM,
    FullLM,
    Mixture,
    Needs,
    Objective,
    PrefixLM,
    RawText,
    Supervised,
    needs_of,
    raw_parts,
)
from common.data.objectives.spans import SHORTEST_INPUTS, SHORTEST_PIECE
from common.data.sources.config import SourceMixture, Sources, other_records, parts_of
from common.errors import UserError, nearest
from common.ranges import Count, Range, Rows, Tokens, Width, check_ranges

MODEL_TYPES = ("unigram", "bpe")
Sentinels = Annotated[int, Range(0, 2**16)]
MOST_SLOTS = 2**28
"""The most slots in a step: a few times as many tokens as in the largest published runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceConfig:
    """A SentencePiece model, loaded from a file or trained on the run's own training split.

    Trained models use pad 0, eos 1, unk 2; a loaded model keeps its own ids. Sentinels are ids after the pieces. The
    fields from `vocab_size` to `training_records` are for training and ignored if `path` is given.
    """

    kind: Literal["sentencepiece"] = "sentencepiece"
    path: str | None = None
    """A SentencePiece `.model` file; None trains one."""
    sentinels: Sentinels = 0
    """Extra ids after the pieces, which replace spans cut out of a text (T5: 100)."""
    vocab_size: Width = 1024
    """Pieces and sentinels together."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    split_digits: bool = True
    """Make every digit a piece by itself."""
    byte_fallback: bool = True
    """Spend 256 ids on single bytes, so that every text can be encoded and decoded; without them, a character that the
    training text lacks becomes `unk`."""
    character_coverage: Annotated[float, Range(0.9, 1)] = 0.9995
    """Share of the training text's characters that get pieces. Bytes encode the others, so it must be 1 without
    `byte_fallback`."""
    training_records: Count = 50_000
    """The most records to train on, evenly spaced over the training split."""

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise UserError(f"model_type {self.model_type!r} is unknown, {nearest(self.model_type, MODEL_TYPES)}")
        check_ranges(self)
        if self.path is None and self.vocab_size <= self.sentinels:
            raise UserError(f"vocab_size {self.vocab_size} leaves no room for {self.sentinels} sentinels")
        if self.character_coverage < 1 and not self.byte_fallback:
            raise UserError(f"character_coverage is {self.character_coverage}: it must be 1 without byte_fallback")


BYTE_PAIR_LEAST = 3 + 256
"""The smallest vocabulary: pad, eos, unk and a token for every byte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytePairConfig:
    """A byte-level byte-pair encoding, loaded from files or trained on the run's own training split.

    Trained ones use pad 0, eos 1, unk 2 and can encode every text. A loaded one keeps its ids, and may be anything that
    a `tokenizer.json` describes. `vocab_size` and `training_records` are for training and ignored if `path` is given.
    """

    kind: Literal["byte_pair"] = "byte_pair"
    path: str | None = None
    """A `tokenizer.json`, or a folder with one or with `vocab.json` and `merges.txt`; None trains one."""
    eos: str | None = None
    """Name of the token that ends a text in a loaded tokenizer; None reads it from `tokenizer_config.json` in the same
    folder, or else tries well-known names."""
    sentinels: Sentinels = 0
    """Extra ids after the others, which replace spans cut out of a text; a loaded tokenizer may have its own."""
    vocab_size: Width = 1024
    """Special tokens, bytes, merges and sentinels together."""
    training_records: Count = 50_000
    """The most records to train on, evenly spaced over the training split."""

    def __post_init__(self) -> None:
        check_ranges(self)
        least = BYTE_PAIR_LEAST + self.sentinels
        if self.path is None and self.vocab_size < least:
            raise UserError(f"vocab_size is {self.vocab_size}; the least, with {self.sentinels} sentinels, is {least}")
        if self.path is None and self.eos is not None:
            raise UserError("eos names a token of a loaded tokenizer, but path is not given")


TokenizerConfig = SentencePieceConfig | BytePairConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How another arm of a study reads the same source; None: as the config that names this reading does."""

    objective: Objective
    source: Sources | None = None
    """The same records by other fields or templates."""
    input_length: Annotated[int, Range(0, 2**24, unit="tokens")] | None = None
    target_length: Tokens | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A stream of batches, each of `rows` packed rows of `input_length` + `target_length` slots.

    Raises UserError for rows too short for any example, for an objective whose fields the source does not name, and for
    readings that cannot be joint (`common.data.joint` says which can).
    """

    source: Sources
    tokenizer: TokenizerConfig = SentencePieceConfig()
    objective: Objective = Supervised()
    rows: Rows
    """Rows a step, over all hosts."""
    input_length: Annotated[int, Range(0, 2**24, unit="tokens")]
    """Input slots in a row."""
    target_length: Tokens
    """Target slots in a row."""
    seed: Annotated[int, Range(0, 2**48 - 1)] = 0
    """Seeds example order, packing and objectives; `train.seed` seeds initialisation and dropout."""
    joint: tuple[Reading, ...] = ()
    """How the other arms of a study read the source. Rows are then planned for all arms, so that each arm reads the
    same source examples in the same rows and steps. Every arm names the others; it may name itself too."""

    @property
    def length_sums(self) -> LengthSums:
        """The length sums of a padded batch."""
        return LengthSums.of_rows(self.rows, self.input_length, self.target_length)

    def __post_init__(self) -> None:
        check_ranges(self)
        least = {Supervised: 1, CausalLM: 0, FullLM: 0}.get(type(self.objective), SHORTEST_INPUTS)
        if self.input_length < least:
            raise UserError(f"input_length is {self.input_length}: it must be {least} or more")
        if (slots := self.rows * (self.input_length + self.target_length)) > MOST_SLOTS:
            raise UserError(f"rows is {self.rows}: that makes {slots:,} slots a step; the most is {MOST_SLOTS:,}")
        for source in parts_of(self.source):
            if isinstance(self.objective, Supervised) == (source.text is not None):
                wanted = "inputs and targets" if isinstance(self.objective, Supervised) else "text"
                raise UserError(f"objective {self.objective.kind!r} reads {wanted}, which the source does not name")
        self._check_pieces()
        self._check_joint()

    def arms(self) -> tuple["DataConfig", ...]:
        """Returns this config, then that of each other arm in `joint`, all without `joint`.

        >>> from common.data.sources.config import SourceConfig
        >>> source = SourceConfig(name="text:a.txt", inputs=None, targets=None, text="text")
        >>> both = (Reading(objective=CausalLM()), Reading(objective=PrefixLM()))
        >>> data = DataConfig(
        ...     source=source, objective=PrefixLM(), rows=8, input_length=64, target_length=64, joint=both
        ... )
        >>> [arm.objective.kind for arm in data.arms()]
        ['prefix_lm', 'causal_lm']
        """
        found = [dataclasses.replace(self, joint=())]
        for i, reading in enumerate(self.joint):
            given = {name: value for name, value in vars(reading).items() if value is not None}
            try:
                arm = dataclasses.replace(found[0], **given)
            except UserError as error:
                raise UserError(f"joint[{i}]: {error}") from None
            if arm not in found:
                found.append(arm)
        return tuple(found)

    def _check_joint(self) -> None:
        """Raises UserError for arms that cannot read the same examples."""
        if not self.joint or len(arms := self.arms()) == 1:
            return
        kinds = [arm.objective.kind for arm in arms]
        records = [arm.objective.kind for arm in arms if not raw_parts(arm.objective)]
        for arm in arms:
            if isinstance(arm.objective, Mixture | UL2 | UL2R):
                raise UserError(
                    f"joint: objective {arm.objective.kind!r} cuts the text anew for each of its parts, so it cannot "
                    f"read the same examples as {', '.join(kind for kind in kinds if kind != arm.objective.kind)}"
                )
            if records and isinstance(arm.objective, PrefixLM) and arm.objective.complementary:
                raise UserError(
                    f"joint: complementary pairs need pieces of equal length, but {records[0]!r} reads records"
                )
            if why := other_records(self.source, arm.source, same_text=not records):
                raise UserError(f"joint: objective {arm.objective.kind!r} must read the records of source: {why}")

    def _check_pieces(self) -> None:
        """Raises UserError where an objective over pieces of text does not fit rows, source or tokenizer."""
        pairs = isinstance(self.objective, PrefixLM) and self.objective.complementary
        if pairs and self.input_length != self.target_length:
            raise UserError(
                f"complementary pairs need as many input as target slots, not {self.input_length} and "
                f"{self.target_length}; nearest: target_length={self.input_length}"
            )
        if pairs and isinstance(self.source, SourceMixture):
            raise UserError("complementary pairs fill rows by themselves and cannot come from a mixture of sources")
        if isinstance(self.objective, FullLM) and self.input_length:
            raise UserError(f"input_length is {self.input_length}, but full_lm has no inputs; nearest: 0")
        for part in raw_parts(self.objective):
            fitted_needs(part.objective, self.input_length, self.target_length)
        if self.tokenizer.path is None:
            self.check_sentinels(self.tokenizer.sentinels)

    def check_sentinels(self, sentinels: int) -> None:
        """Raises UserError if the objective needs more sentinels than the tokenizer's `sentinels`."""
        for part in raw_parts(self.objective):
            needed = needs_of(part.objective, self.input_length, self.target_length).sentinels
            if needed > sentinels:
                raise UserError(
                    f"objective {part.objective.kind!r} at input_length {self.input_length} needs {needed} sentinels, "
                    f"tokenizer.sentinels is {sentinels}; nearest: {needed}"
                )


def fitted_needs(objective: RawText, input_length: int, target_length: int) -> Needs:
    """Computes `needs_of`. Raises UserError if no whole piece of text fits such rows."""
    needs = needs_of(objective, input_length, target_length)
    if needs.piece < SHORTEST_PIECE:
        raise UserError(f"target_length is {target_length}: it must be {SHORTEST_INPUTS} or more")
    if needs.targets > target_length:
        raise UserError(
            f"target_length is {target_length}; {objective.kind} at input_length {input_length} makes targets of "
            f"{needs.targets}; nearest: {needs.targets}"
        )
    return needs
