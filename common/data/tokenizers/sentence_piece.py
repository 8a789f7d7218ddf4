"""SentencePiece tokenizers: trained on a run's text, or loaded from a file.

Source: Kudo & Richardson 2018, "SentencePiece: A simple and language independent subword tokenizer and detokenizer for
neural text processing" (https://arxiv.org/abs/1808.06226); sentinels as in Raffel et al. 2020
(https://arxiv.org/abs/1910.10683): ids on top of the pieces, counted down from the highest.
"""

import functools
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from common.data.config import SentencePieceConfig
from common.data.tokenizers.vocabulary import (
    MODE,
    SPACE_MARK,
    check_unicode,
    decode_around_sentinels,
    encode_after_mode,
    encode_around_sentinels,
    own_sentinels,
    sentinel_at,
    sentinels_on_top,
    table_rows,
)
from common.errors import UserError

VERSION = f"{sentencepiece.__version__}-2"
"""Versions of the library and of `train_model`: raise the second with any change of the models it makes."""
UNKNOWN_MARK = "\u2585"
"""How SentencePiece writes an unknown piece; it skips training lines that contain this character."""
_ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]


class SentencePieceTokenizer:
    """A `Tokenizer` (see common/data/tokenizers/tokenizer.py) over a SentencePiece model.

    A tokenizer that this module trained is lossless: `decode(encode(x)) == x` for every text. A loaded one behaves as
    its model does (T5's folds compatible characters and runs of spaces). Only objectives and `encode_with_sentinels`
    make sentinels: `encode` spells the text `<extra_id_0>` like any other.
    """

    def __init__(self, model: bytes, *, sentinels: int = 0) -> None:
        """Loads the bytes of a SentencePiece model; `sentinels` are appended above its pieces.

        Raises UserError if they are no such model, if a needed special id is missing, or if sentinels would be added to
        a model that has some.
        """
        self._bytes, self._model = model, _load_processor(model)
        own = own_sentinels(_named_pieces(self._model, model), sentinels)
        if own:
            self._model = _load_processor(_make_control(model, own))
        self.pieces: int = self._model.get_piece_size()
        self._sentinel_ids = own or sentinels_on_top(self.pieces, sentinels)
        self.sentinels, self.appended_sentinels = len(self._sentinel_ids), 0 if own else sentinels
        self.vocab_size = self.pieces + self.appended_sentinels
        """The number of pieces and appended sentinels."""
        self.table_size = table_rows(self.vocab_size)
        """Rows of an embedding table: `vocab_size`, padded up."""
        pad, start = self._model.pad_id(), self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.unk_id: int = self._model.unk_id()
        # Padding is never read (segment ids mark it), so any id serves if the model has no pad.
        self.pad_id: int = max(pad, 0)
        self.start_id: int = pad if pad >= 0 else start
        self.bos_id: int | None = start if start >= 0 else None
        if self.eos_id < 0 or self.start_id < 0:
            raise UserError("the SentencePiece model needs an eos id, and a pad or bos id to start targets with")
        layout = f"|{self.appended_sentinels}" + ("|no text spells a sentinel" if own else "")
        self.content_hash = hashlib.blake2b(model + layout.encode(), digest_size=16).hexdigest()
        """Hash of the model's bytes and the number of sentinels."""
        self._sentinel_numbers = {token: k for k, token in enumerate(self._sentinel_ids)}
        first = self._model.encode("x")[:1]
        self._adds_space = any(self._model.id_to_piece(token).startswith(SPACE_MARK) for token in first)
        self._mark_ids = self._space_mark_bytes()
        control = set(filter(self._model.is_control, range(self.pieces))) - {self.pad_id, self.eos_id, self.start_id}
        names = {token: self._model.id_to_piece(token) for token in sorted(control)}
        self.modes = {name: token for token, name in names.items() if MODE.fullmatch(name)}

    @functools.cached_property
    def ordinary_ids(self) -> np.ndarray:
        """int32 [ids]: the ids of pieces of text, without special tokens and sentinels."""
        model = self._model
        special = (model.is_control, model.is_unknown, model.is_unused)
        ids = [piece for piece in range(self.pieces) if not any(is_special(piece) for is_special in special)]
        return np.array(ids, np.int32)

    def serialized(self) -> bytes:
        """Returns the bytes of the SentencePiece model as read, without appended sentinels."""
        return self._bytes

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 [length], without bos and eos. Raises UserError for text that is not valid Unicode."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, for many texts."""
        try:
            ids = self._model.encode(list(texts), return_type="numpy", num_threads=1)
        except (RuntimeError, TypeError, UnicodeError):
            check_unicode(texts)
            raise
        if self._mark_ids:
            ids = [self._encode_with_marks(t) if SPACE_MARK in t else i for t, i in zip(texts, ids, strict=True)]
        return ids

    def encode_with_sentinels(self, text: str) -> np.ndarray:
        """As `encode`, but names of sentinels in `text`, and a leading mode, become their ids."""

        def encode(text: str) -> list[int]:
            return encode_around_sentinels(text, self._sentinel_ids, self.encode, adds_space=self._adds_space)

        return np.array(encode_after_mode(text, self.modes, encode), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of any ids that a model may generate.

        Skips pad, eos and start; writes a sentinel as `<extra_id_K>` with spaces around it, and an id beyond the
        vocabulary (a padding row of the table) as unk.
        """
        known = [token if token < self.vocab_size else self.unk_id for token in map(int, ids)]
        return decode_around_sentinels(known, self._sentinel_numbers, self._model.decode)

    def sentinel_id(self, k: int) -> int:
        """Returns the id of sentinel `k`; appended sentinel 0 has the highest id. Raises UserError if there is none."""
        return sentinel_at(self._sentinel_ids, k)

    def piece(self, token: int) -> str | None:
        """Returns the vocabulary's name of an id."""
        if token >= self.pieces:
            return f"<extra_id_{self.vocab_size - 1 - token}>"
        return self._model.id_to_piece(token)

    def _space_mark_bytes(self) -> list[int]:
        """Returns the ids of the space mark's bytes; empty if the model lacks byte pieces, also for newline."""
        spelt = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        newline = self._model.piece_to_id("<0x0A>")
        plain = self.unk_id not in (*spelt, newline) and self._model.encode("\n")[-1:] == [newline]
        return spelt if plain else []

    def _encode_with_marks(self, text: str) -> np.ndarray:
        """Returns the ids of a text that contains the space mark, which SentencePiece would decode as a space."""
        first, *rest = text.split(SPACE_MARK)
        ids = list(self._model.encode(first))
        # A newline is a single byte piece, so the text after it is segmented as in the middle of a text, without the
        # space that SentencePiece adds before a text.
        skip = len(self._model.encode("\n"))
        for part in rest:
            ids += self._mark_ids + self._model.encode("\n" + part)[skip:]
        return np.array(ids, np.int32)


def _load_processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"not a SentencePiece model: {error}") from None


def _named_pieces(processor: sentencepiece.SentencePieceProcessor, model: bytes) -> dict[str, int]:
    """Returns control and user-defined pieces -> ids if the model has sentinels, as mT5's does; else an empty dict."""
    if not own_sentinels({processor.id_to_piece(token): token for token in range(processor.get_piece_size())}, 0):
        return {}
    pieces = _ModelProto.FromString(model).pieces
    named = (pieces[0].USER_DEFINED, pieces[0].CONTROL)
    return {piece.piece: token for token, piece in enumerate(pieces) if piece.type in named}


def _make_control(model: bytes, ids: Iterable[int]) -> bytes:
    """Returns the model with these pieces as control symbols, which `encode` never returns."""
    changed = _ModelProto.FromString(model)
    for token in ids:
        changed.pieces[token].type = changed.pieces[token].CONTROL
    return changed.SerializeToString()


def train_model(lines: Iterable[str], config: SentencePieceConfig, modes: Sequence[str] = ()) -> bytes:
    """Trains a SentencePiece model and returns its bytes; equal lines in equal order give equal bytes.

    Each of `modes` becomes a token that `encode` never returns. Text is not normalised, and spaces are not folded.
    Raises UserError, with the nearest possible size, if the text cannot fill `config.vocab_size`, or its characters do
    not fit.
    """
    model = io.BytesIO()
    parts = [part for line in lines for part in line.split(UNKNOWN_MARK)]
    if not any(parts):
        why = f"all {len(parts)} lines are empty" if parts else "the training split is empty"
        raise UserError(f"there is no text to train the tokenizer on: {why}")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(parts),
            model_writer=model,
            vocab_size=config.vocab_size - config.sentinels,
            model_type=config.model_type,
            split_digits=config.split_digits,
            byte_fallback=config.byte_fallback,
            character_coverage=config.character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            control_symbols=list(modes),
            num_threads=1,  # several threads sum in varying order, which changes scores and bytes
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_error(str(error), config)) from None
    return model.getvalue()


def _training_error(message: str, config: SentencePieceConfig) -> str:
    """Returns SentencePiece's error message in the config's terms."""
    largest = re.search(r"too high \(\d+\).*<= (\d+)", message)
    least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    bound = f"tokenizer.vocab_size {config.vocab_size} is too"
    if largest:
        return f"{bound} large for this text: at most {int(largest[1]) + config.sentinels} is possible"
    if least:
        return f"{bound} small for this text's characters: at least {int(least[1]) + config.sentinels} is needed"
    return f"SentencePiece cannot be trained: {message}"
