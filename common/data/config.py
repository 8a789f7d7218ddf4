"""Configs of what a run reads: source, tokenizer, objective and the shape of its rows.

Configs are checked when they are made, so a wrong value is one clear line before any work starts.
"""

import dataclasses
from typing import Annotated, Literal

from common.data.objectives.config import (
    CausalLM,
    FullLM,
    Needs,
    Objective,
    PrefixLM,
    RawText,
    Supervised,
    needs_of,
    raw_parts,
)
from common.data.objectives.spans import SHORTEST_INPUTS, SHORTEST_PIECE
from common.data.sources.config import SourceMixture, Sources, parts_of
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
class DataConfig:
    """A stream of batches, each of `rows` packed rows of `input_length` + `target_length` slots.

    Raises UserError for rows too short for any example, and for an objective whose fields the source does not name.
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
