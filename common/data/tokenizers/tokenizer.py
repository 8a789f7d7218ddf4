"""One tokenizer for all arms of a comparison: trained on the run's own text, or loaded from a file."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from common.data.cache import build_once
from common.data.config import BytePairConfig, SentencePieceConfig, TokenizerConfig
from common.data.progress import counter, spinner
from common.data.sources.records import Problem, Source, in_batches
from common.data.tokenizers import byte_pair, sentence_piece
from common.data.tokenizers.byte_pair import BytePairTokenizer
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.errors import UserError
from common.paths import user_path

TRAINING_LINE = 1000
"""Longest training line in characters: SentencePiece leaves out, silently, lines of more than 4,192 bytes."""
RECORDS_AT_ONCE = 2048


class Tokenizer(Protocol):
    """Text to ids and back.

    A trained one reads back exactly what it wrote, for every text, has pad 0, eos 1, unk 2, and starts targets with
    pad. A loaded one keeps its ids and does what its model does. No text spells a special token or a sentinel.
    """

    vocab_size: int
    """Ids are less than this, sentinels included."""
    table_size: int
    """Rows of an embedding table: `vocab_size`, padded up."""
    sentinels: int
    """How many; their ids are `sentinel_id`'s."""
    pad_id: int
    eos_id: int
    unk_id: int
    start_id: int
    """Stands in front of shifted targets."""
    bos_id: int | None
    """What stands in front of a text on its own, where the tokenizer has such a token; `encode` does not add it, since
    a text may be a target or a continuation."""
    content_hash: str
    """Two tokenizers with equal hashes write equal ids."""

    modes: dict[str, int]
    """Names and ids of mode tokens, which stand in front of inputs; see `vocabulary.MODE`."""

    @property
    def ordinary_ids(self) -> np.ndarray:
        """int32: the ids that texts are spelled with, which are neither special nor sentinels."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """int32 [length]: the ids of `text` alone. Raises UserError for text that is not valid Unicode."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, for many texts."""
        ...

    def encode_with_sentinels(self, text: str) -> np.ndarray:
        """As `encode`, but the names of sentinels in `text`, as `decode` writes them, become their ids.

        Meant for prompts that a person writes, never for text that is read in bulk.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, whatever a model emits.

        Pad, eos and start are left out, a sentinel reads `<extra_id_K>` between spaces, and an id beyond the vocabulary
        (a table's padding rows) reads as unk does.
        """
        ...

    def sentinel_id(self, k: int) -> int:
        """The id of sentinel `k`. Raises UserError beyond the last."""
        ...

    def piece(self, token: int) -> str | None:
        """How the vocabulary names an id below `vocab_size`; None for one that stands for nothing."""
        ...


def open_tokenizer(config: TokenizerConfig, source: Source, cache_dir: Path, modes: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a run: loaded from `config.path`, or trained on `source` (the training split) and cached.

    A trained one has a token for each of `modes`; a loaded one has the tokens that it has. The cache's key is the
    source's content id, the config, the modes and the version of the library that trains. Raises UserError where the
    file cannot be read, or the text is too little for the vocabulary.
    """
    if config.path is not None:
        return load_tokenizer(config)
    library, train = _trainer(config, modes)
    identity = [source.content_id, dataclasses.asdict(config), library, *modes]
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()

    def build(path: Path) -> None:
        lines = list(training_lines(source, config.training_records))
        with spinner(f"training the tokenizer on {len(lines):,} lines"):
            path.write_bytes(train(lines))

    model = build_once(cache_dir / "tokenizers" / f"{key}.model", build).read_bytes()
    match config:
        case SentencePieceConfig():
            return SentencePieceTokenizer(model, sentinels=config.sentinels)
        case BytePairConfig():
            return BytePairTokenizer.trained(model, sentinels=config.sentinels)


def mode_ids(tokenizer: Tokenizer, mode: str) -> list[int]:
    """The ids that mark a mode in front of inputs: its token, or its name in ordinary pieces where it has none."""
    return [tokenizer.modes[mode]] if mode in tokenizer.modes else tokenizer.encode(mode).tolist()


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that lies at `config.path`, which must be given. Raises UserError where it cannot be read."""
    assert config.path is not None
    path = user_path(config.path, "tokenizer.path")
    match config:
        case SentencePieceConfig():
            try:
                model = path.read_bytes()
            except OSError as error:
                raise UserError(f"tokenizer.path {config.path!r} cannot be read: {error.strerror}") from None
            return SentencePieceTokenizer(model, sentinels=config.sentinels)
        case BytePairConfig():
            return byte_pair.load_byte_pair(path, sentinels=config.sentinels, eos=config.eos)


def training_lines(source: Source, records: int) -> Iterator[str]:
    """Lines to train on: all text fields of at most `records` records, evenly spaced, in the source's order.

    Raises UserError where none of these records can be used.
    """
    count, problems = min(records, len(source)), []
    indices = [number * len(source) // count for number in range(count)]
    with counter("reading text for the tokenizer", count) as tick:
        for batch in in_batches(source, indices, RECORDS_AT_ONCE):
            for record in batch:
                if isinstance(record, Problem):  # named where the text is read for training
                    problems.append(record)
                    continue
                for field in ("inputs", "targets", "text"):
                    for line in record.get(field, "").split("\n"):
                        yield from (line[at : at + TRAINING_LINE] for at in range(0, len(line), TRAINING_LINE))
            tick(len(batch))
    if count and len(problems) == count:
        raise UserError(f"none of the training text's records can be used; the first: {problems[0]}")


def _trainer(config: TokenizerConfig, modes: Sequence[str]) -> tuple[str, Callable[[Iterable[str]], bytes]]:
    """(the version of what trains, a function from lines to a model's bytes)."""
    match config:
        case SentencePieceConfig():
            return sentence_piece.VERSION, lambda lines: sentence_piece.train_model(lines, config, modes)
        case BytePairConfig():
            return byte_pair.VERSION, lambda lines: byte_pair.train_model(lines, config, modes)
