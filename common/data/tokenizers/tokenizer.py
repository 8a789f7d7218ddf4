"""The tokenizer of a run, which all arms of a comparison share: trained on the run's text, or loaded from a file."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from common.data.cache import build_once
from common.data.config import BytePairConfig, SentencePieceConfig, TokenizerConfig
from common.data.sources.records import Problem, Source, in_batches
from common.data.tokenizers import byte_pair, sentence_piece
from common.data.tokenizers.byte_pair import BytePairTokenizer
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.errors import UserError
from common.paths import user_path
from common.progress import counter, spinner

TRAINING_LINE = 1000
"""Longest training line, in characters: SentencePiece silently skips lines of more than 4,192 bytes."""
RECORDS_AT_ONCE = 2048


class Tokenizer(Protocol):
    """Encodes text as ids and decodes ids.

    A tokenizer that we train has pad 0, eos 1, unk 2, starts targets with pad, and decodes every text that it encoded
    unchanged. A loaded one keeps its ids and behaves as its model does. `encode` never returns a special token or a
    sentinel.
    """

    vocab_size: int
    """All ids, including sentinels, are less than this."""
    table_size: int
    """Rows of an embedding table: `vocab_size`, padded up."""
    sentinels: int
    """The number of sentinels."""
    pad_id: int
    eos_id: int
    unk_id: int
    start_id: int
    """The first decoder input, before the shifted targets."""
    bos_id: int | None
    """The token before a text that stands alone, if the tokenizer has one. `encode` does not add it, since a text may
    be a target or a continuation."""
    content_hash: str
    """Tokenizers with equal hashes return equal ids."""

    modes: dict[str, int]
    """Names and ids of mode tokens, which precede inputs; see `vocabulary.MODE`."""

    @property
    def ordinary_ids(self) -> np.ndarray:
        """int32 [ids]: the ids of pieces of text, without special tokens and sentinels."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 [length], without bos and eos. Raises UserError for text that is not valid Unicode."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, for many texts."""
        ...

    def encode_with_sentinels(self, text: str) -> np.ndarray:
        """As `encode`, but names of sentinels in `text`, as `decode` writes them, and a leading mode become their ids.

        For prompts that a person writes, never for text of a data set.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of any ids that a model may generate.

        Skips pad, eos and start; writes a sentinel as `<extra_id_K>` with spaces around it, and an id beyond the
        vocabulary (a padding row of the table) as unk.
        """
        ...

    def sentinel_id(self, k: int) -> int:
        """Returns the id of sentinel `k`. Raises UserError if there is none."""
        ...

    def piece(self, token: int) -> str | None:
        """Returns the vocabulary's name of an id below `vocab_size`, or None for an unused id."""
        ...


def open_tokenizer(config: TokenizerConfig, source: Source, cache_dir: Path, modes: Sequence[str] = ()) -> Tokenizer:
    """Loads a run's tokenizer from `config.path`, or trains it on `source` (the training split) and caches it.

    A trained tokenizer has a token for each of `modes`; a loaded one keeps its tokens. The cache's key is the source's
    content id, the config, the modes and the version of the library that trains. Raises UserError if the file cannot be
    read, or if there is too little text for the vocabulary.
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
    """Returns the ids of a mode before inputs: its token, or its name in ordinary pieces if it has no token."""
    return [tokenizer.modes[mode]] if mode in tokenizer.modes else tokenizer.encode(mode).tolist()


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Loads the tokenizer at `config.path`, which must not be None. Raises UserError if it cannot be read."""
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
    """Yields lines to train on: all text fields of at most `records` records, evenly spaced, in the source's order.

    Raises UserError if none of these records can be used.
    """
    count, problems = min(records, len(source)), []
    indices = [number * len(source) // count for number in range(count)]
    with counter("reading text for the tokenizer", count) as tick:
        for batch in in_batches(source, indices, RECORDS_AT_ONCE):
            for record in batch:
                if isinstance(record, Problem):  # reported when the text is read for training
                    problems.append(record)
                    continue
                for field in ("inputs", "targets", "text"):
                    for line in record.get(field, "").split("\n"):
                        yield from (line[at : at + TRAINING_LINE] for at in range(0, len(line), TRAINING_LINE))
            tick(len(batch))
    if count and len(problems) == count:
        raise UserError(f"no record of the training text can be used; the first problem: {problems[0]}")


def _trainer(config: TokenizerConfig, modes: Sequence[str]) -> tuple[str, Callable[[Iterable[str]], bytes]]:
    """Returns (version of the library that trains, function from lines to the bytes of a model)."""
    match config:
        case SentencePieceConfig():
            return sentence_piece.VERSION, lambda lines: sentence_piece.train_model(lines, config, modes)
        case BytePairConfig():
            return byte_pair.VERSION, lambda lines: byte_pair.train_model(lines, config, modes)
