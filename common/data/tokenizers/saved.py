"""Saves a tokenizer in a folder: the files that it was read from, and a description with its hash.

Runs and prepared data save theirs, so that using a model or tokens does not need the tokenizer's training text.
"""

import dataclasses
from pathlib import Path
from typing import Literal

from common.config import from_earlier_json, to_json
from common.data.tokenizers import byte_pair
from common.data.tokenizers.byte_pair import BytePairTokenizer, SpecialTokens
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from common.files import json_bytes, read_json

DESCRIPTION = "description.json"
MODEL = "spiece.model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SavedSentencePiece:
    kind: Literal["sentencepiece"] = "sentencepiece"
    sentinels: int
    content_hash: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SavedBytePair:
    kind: Literal["byte_pair"] = "byte_pair"
    special: SpecialTokens
    sentinels: int
    content_hash: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Description:
    tokenizer: _SavedSentencePiece | _SavedBytePair


def saved_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns name -> content of the files from which `load_saved` makes the same tokenizer."""
    described: _SavedSentencePiece | _SavedBytePair
    match tokenizer:
        case SentencePieceTokenizer():
            files = {MODEL: tokenizer.serialized()}
            described = _SavedSentencePiece(sentinels=tokenizer.appended_sentinels, content_hash=tokenizer.content_hash)
        case BytePairTokenizer():
            files = tokenizer.files_read
            described = _SavedBytePair(
                special=tokenizer.special,
                sentinels=tokenizer.appended_sentinels,
                content_hash=tokenizer.content_hash,
            )
        case _:
            raise AssertionError(f"a {type(tokenizer).__name__} cannot be saved")
    return {**files, DESCRIPTION: json_bytes(to_json(_Description(tokenizer=described)))}


def load_saved(folder: Path) -> Tokenizer:
    """Loads a tokenizer from the `saved_files` in `folder`. Raises UserError if a file is missing or damaged."""
    where = folder / DESCRIPTION
    try:
        described = from_earlier_json(_Description, read_json(where)).tokenizer
        tokenizer = _load(folder, described)
    except UserError as error:
        raise UserError(f"the tokenizer in {folder} is damaged: {error}") from None
    if tokenizer.content_hash != described.content_hash:
        raise UserError(
            f"the tokenizer in {folder} is damaged: its hash is {tokenizer.content_hash}, but {where.name} records "
            f"{described.content_hash}"
        )
    return tokenizer


def _load(folder: Path, described: _SavedSentencePiece | _SavedBytePair) -> Tokenizer:
    match described:
        case _SavedSentencePiece():
            try:
                model = (folder / MODEL).read_bytes()
            except OSError as error:
                raise UserError(f"{MODEL} cannot be read ({error.strerror})") from None
            return SentencePieceTokenizer(model, sentinels=described.sentinels)
        case _SavedBytePair():
            tokenizer, files = byte_pair.read_tokenizer_files(folder)
            return BytePairTokenizer(tokenizer, described.special, sentinels=described.sentinels, files=files)
