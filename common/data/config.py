"""What a run reads: source, tokenizer, objective and the shape of its rows.

Everything here is checked when it is made, so a wrong value is one clear line before any work starts. Defaults live
here and nowhere else.
"""

import dataclasses
from typing import Literal

from common.data.objective_config import CausalLM, Objective, Supervised, needs_of, raw_parts
from common.data.spans import SHORTEST_INPUTS, SHORTEST_PIECE
from common.errors import UserError, nearest

SOURCE_SCHEMES = ("tfds", "jsonl", "tsv", "text", "lines", "parquet", "tfrecord", "arrayrecord")
MODEL_TYPES = ("unigram", "bpe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where text comes from, and which fields of a record are read.

    Raises UserError for an unknown scheme, or when neither `inputs` and `targets` nor `text` is named.
    """

    name: str
    """`tfds:NAME` (for example `tfds:cldr_translate/en_de`), or files: `jsonl:PATH`, `tsv:PATH`, `text:PATH`,
    `lines:PATH` (parallel texts; PATH holds `{field}`), `parquet:PATH`, `tfrecord:PATH` or `arrayrecord:PATH`. PATH may
    hold `{split}`, be a glob, an url (`gs://...`), and for the last three a folder; text may be compressed."""
    inputs: str | None
    """Field that holds the inputs; None where records are plain text."""
    targets: str | None
    text: str | None = None
    """Field that holds plain text, in place of `inputs` and `targets`."""
    group: str | None = None
    """Field by which scores are grouped (kind of phrase, task); not read by models."""
    train_split: str = "train"
    validation_split: str = "validation"

    def __post_init__(self) -> None:
        scheme, _, rest = self.name.partition(":")
        if scheme not in SOURCE_SCHEMES or not rest:
            raise UserError(
                f"name {self.name!r} must be SCHEME:NAME; scheme {scheme!r} is unknown or nothing follows it, "
                + nearest(scheme, SOURCE_SCHEMES)
            )
        pair = self.inputs is not None and self.targets is not None
        if (self.inputs is None) != (self.targets is None) or pair == (self.text is not None):
            raise UserError("name either both inputs and targets, or text alone")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceConfig:
    """A SentencePiece model: loaded from a file, or trained on the run's own training split.

    Trained models use pad 0, eos 1, unk 2; a loaded model keeps its own. Sentinels are ids on top of the pieces. The
    fields from `vocab_size` to `training_records` say how to train and are not read where `path` is given, except
    `sentinels`, which holds for both.
    """

    kind: Literal["sentencepiece"] = "sentencepiece"
    path: str | None = None
    """A SentencePiece `.model` file; None trains one."""
    sentinels: int = 0
    """Extra ids on top, that stand for spans cut out of a text (T5: 100)."""
    vocab_size: int = 1024
    """Pieces and sentinels together."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    split_digits: bool = True
    """Every digit is a piece of its own."""
    byte_fallback: bool = True
    """Spend 256 ids on single bytes, so that every text can be written and read back; without them a character that the
    training text lacks becomes `unk`."""
    character_coverage: float = 0.9995
    """Share of the training text's characters that get a piece of their own. The rest is written in bytes, so without
    `byte_fallback` it must be 1."""
    training_records: int = 50_000
    """At most that many records, evenly spaced over the training split, are trained on."""

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise UserError(f"model_type {self.model_type!r} is unknown, {nearest(self.model_type, MODEL_TYPES)}")
        if self.sentinels < 0:
            raise UserError(f"sentinels is {self.sentinels}; the least is 0")
        if self.path is None and self.vocab_size <= self.sentinels:
            raise UserError(f"vocab_size {self.vocab_size} leaves no room for {self.sentinels} sentinels")
        if self.training_records < 1:
            raise UserError(f"training_records is {self.training_records}; the least is 1")
        if not 0.9 <= self.character_coverage <= 1 or (self.character_coverage < 1 and not self.byte_fallback):
            raise UserError(
                f"character_coverage {self.character_coverage} must lie in 0.9..1, and be 1 without byte_fallback"
            )


BYTE_PAIR_LEAST = 3 + 256
"""Pad, eos and unk, and a token for every byte."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BytePairConfig:
    """Byte-level byte-pair encoding: loaded from files, or trained on the run's own training split.

    Trained ones use pad 0, eos 1, unk 2 and can write every text. A loaded one keeps its ids, and may be anything that
    a `tokenizer.json` describes. `vocab_size` and `training_records` say how to train and are not read where `path` is
    given.
    """

    kind: Literal["byte_pair"] = "byte_pair"
    path: str | None = None
    """A `tokenizer.json`, or a folder that holds one, or that holds `vocab.json` and `merges.txt`; None trains one."""
    eos: str | None = None
    """Name of the token that ends a text, in a loaded tokenizer; None takes what `tokenizer_config.json` beside it
    says, or else a well-known name."""
    sentinels: int = 0
    """Extra ids on top, that stand for spans cut out of a text; a loaded tokenizer may have its own."""
    vocab_size: int = 1024
    """Special tokens, bytes, merges and sentinels together."""
    training_records: int = 50_000
    """At most that many records, evenly spaced over the training split, are trained on."""

    def __post_init__(self) -> None:
        if self.sentinels < 0:
            raise UserError(f"sentinels is {self.sentinels}; the least is 0")
        least = BYTE_PAIR_LEAST + self.sentinels
        if self.path is None and self.vocab_size < least:
            raise UserError(f"vocab_size is {self.vocab_size}; the least, with {self.sentinels} sentinels, is {least}")
        if self.path is None and self.eos is not None:
            raise UserError("eos names a token of a loaded tokenizer, but path is not given")
        if self.training_records < 1:
            raise UserError(f"training_records is {self.training_records}; the least is 1")


TokenizerConfig = SentencePieceConfig | BytePairConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One stream of batches: `rows` packed rows of `input_length` + `target_length` slots a step.

    Raises UserError for sizes that cannot hold anything and for an objective whose fields the source does not name.
    """

    source: SourceConfig
    tokenizer: TokenizerConfig = SentencePieceConfig()
    objective: Objective = Supervised()
    rows: int
    """Rows a step, over all hosts."""
    input_length: int
    """Input slots a row, in tokens."""
    target_length: int
    """Target slots a row, in tokens."""
    seed: int = 0

    def __post_init__(self) -> None:
        least = {
            "rows": 1,
            "input_length": {Supervised: 1, CausalLM: 0}.get(type(self.objective), SHORTEST_INPUTS),
            "target_length": 1,
            "seed": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise UserError(f"{name} is {getattr(self, name)}; the least is {bound}")
        if isinstance(self.objective, Supervised) == (self.source.text is not None):
            wanted = "inputs and targets" if isinstance(self.objective, Supervised) else "text"
            raise UserError(f"objective {self.objective.kind!r} reads {wanted}, which the source does not name")
        for part in raw_parts(self.objective):
            needs = needs_of(part.objective, self.input_length, self.target_length)
            if needs.piece < SHORTEST_PIECE:
                raise UserError(f"target_length is {self.target_length}; the least is {SHORTEST_INPUTS}")
            if needs.targets > self.target_length:
                raise UserError(
                    f"target_length is {self.target_length}; {part.objective.kind} at input_length "
                    f"{self.input_length} makes targets of {needs.targets}; nearest: {needs.targets}"
                )
        if self.tokenizer.path is None:
            self.check_sentinels(self.tokenizer.sentinels)

    def check_sentinels(self, sentinels: int) -> None:
        """Raises UserError where the objective needs more sentinels than the tokenizer has."""
        for part in raw_parts(self.objective):
            needed = needs_of(part.objective, self.input_length, self.target_length).sentinels
            if needed > sentinels:
                raise UserError(
                    f"objective {part.objective.kind!r} at input_length {self.input_length} needs {needed} sentinels, "
                    f"tokenizer.sentinels is {sentinels}; nearest: {needed}"
                )
