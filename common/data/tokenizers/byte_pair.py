"""Byte-pair tokenizers: trained on a run's text, or loaded from a published model's files.

Source: Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"
(https://arxiv.org/abs/1508.07909), over bytes as in Radford et al. 2019 (GPT-2). The library
`tokenizers` trains and encodes.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from common.data.config import BYTE_PAIR_LEAST, BytePairConfig
from common.data.tokenizers.plain_text import plain_text_encoder
from common.data.tokenizers.vocabulary import (
    MODE,
    check_unicode,
    decode_around_sentinels,
    encode_after_mode,
    encode_around_sentinels,
    own_sentinels,
    sentinel_at,
    sentinels_on_top,
    table_rows,
)
from common.errors import UserError, nearest
from common.files import read_json

VERSION: str = tokenizers.__version__
SINGLE_FILE, FILE_PAIR = "tokenizer.json", ("vocab.json", "merges.txt")
"""A tokenizer is read from either one file or a pair of files with these names."""
TRAINED_SPECIALS = ("⟨pad⟩", "⟨eos⟩", "⟨unk⟩")
"""Ids 0, 1, 2. Their brackets are not in the byte alphabet, so no merge can produce one."""
WELL_KNOWN = {
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>"),
    "pad": ("<pad>", "<|finetune_right_pad_id|>"),
    "unk": ("<unk>",),
}
"""Names to look for if no `tokenizer_config.json` names a token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of special tokens, as in `Tokenizer`; several may be equal."""

    pad: int
    eos: int
    unk: int
    start: int
    bos: int | None


class BytePairTokenizer:
    """A `Tokenizer` (see common/data/tokenizers/tokenizer.py) over one of the `tokenizers` library."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, special: SpecialTokens, *, sentinels: int, files: Mapping[str, bytes]
    ) -> None:
        """Wraps `tokenizer`.

        Args:
          tokenizer: changed to encode without padding, truncation and special tokens.
          special: the ids of its special tokens.
          sentinels: how many sentinels to append above its ids; 0 if it has its own.
          files: name -> content of the files that it was read from.

        Raises UserError if sentinels would be added to a tokenizer that has some.
        """
        self._tokenizer, self.special, self.files_read = tokenizer, special, dict(files)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        own, pieces = own_sentinels(vocabulary, sentinels), max(vocabulary.values()) + 1
        self._sentinel_ids = own or sentinels_on_top(pieces, sentinels)
        self.sentinels, self.appended_sentinels = len(self._sentinel_ids), 0 if own else sentinels
        self.vocab_size = pieces + self.appended_sentinels
        self.table_size = table_rows(self.vocab_size)
        self.pad_id, self.eos_id, self.unk_id = special.pad, special.eos, special.unk
        self.start_id, self.bos_id = special.start, special.bos
        self._sentinel_numbers = {token: k for k, token in enumerate(self._sentinel_ids)}
        self._skipped = _skipped_ids(tokenizer, special) - set(self._sentinel_ids)
        self._known = frozenset(vocabulary.values())
        self._reserved = self._special_ids() | set(self._sentinel_ids)
        named = self._special_ids() - {special.pad, special.eos, special.unk, special.start, special.bos}
        self.modes = {name: token for name, token in vocabulary.items() if token in named and MODE.fullmatch(name)}
        self._encoder = plain_text_encoder(tokenizer, self._reserved & self._known)
        first = self.encode("x")[:1].tolist()
        self._adds_space = any((tokenizer.id_to_token(token) or "").startswith(("\u2581", "Ġ")) for token in first)
        layout: list[Any] = [dataclasses.astuple(special), self.appended_sentinels]
        if self._encoder is not tokenizer:
            layout.append("no text spells a special token")
        content = b"\n\n".join(files.values()) + json.dumps(layout).encode()
        self.content_hash = hashlib.blake2b(content, digest_size=16).hexdigest()

    @classmethod
    def trained(cls, model: bytes, *, sentinels: int) -> "BytePairTokenizer":
        """Returns a tokenizer from the bytes that `train_model` returned."""
        special = SpecialTokens(pad=0, eos=1, unk=2, start=0, bos=None)
        return cls(tokenizers.Tokenizer.from_buffer(model), special, sentinels=sentinels, files={SINGLE_FILE: model})

    def files(self) -> dict[str, bytes]:
        """Returns name -> content of files from which `load_byte_pair` makes the same tokenizer.

        The loader must be called with `sentinels=appended_sentinels`.
        """
        special = self.special
        roles = {"pad": special.pad, "eos": special.eos, "unk": special.unk, "bos": special.bos}
        names = {f"{role}_token": self._tokenizer.id_to_token(i) for role, i in roles.items() if i is not None}
        described = names | {"add_bos_token": special.bos is not None}
        return {
            SINGLE_FILE: self.files_read.get(SINGLE_FILE) or self._tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps(described, indent=2).encode(),
        }

    @functools.cached_property
    def ordinary_ids(self) -> np.ndarray:
        """int32 [ids]: the ids of pieces of text, without special tokens and sentinels."""
        return np.array(sorted(self._known - self._reserved), np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 [length], without bos and eos. Raises UserError for text that is not valid Unicode."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, for many texts, in parallel on all cores."""
        try:
            encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            check_unicode(texts)
            raise
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def encode_with_sentinels(self, text: str) -> np.ndarray:
        """As `encode`, but names of sentinels in `text`, and a leading mode, become their ids."""

        def encode(text: str) -> list[int]:
            return encode_around_sentinels(text, self._sentinel_ids, self.encode, adds_space=self._adds_space)

        return np.array(encode_after_mode(text, self.modes, encode), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of any ids; skips special tokens, except unk, which shows its name."""
        known = (token if token in self._known or token in self._sentinel_numbers else self.unk_id for token in ids)
        kept = [token for token in known if token not in self._skipped]
        return decode_around_sentinels(kept, self._sentinel_numbers, self._decode_run)

    def sentinel_id(self, k: int) -> int:
        """Returns the id of sentinel `k`. Raises UserError if there is none."""
        return sentinel_at(self._sentinel_ids, k)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = self._encoder.encode_special_tokens = True  # pickling loses this

    def _special_ids(self) -> set[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        named = {token for token, one in added.items() if one.special}
        return named | {self.pad_id, self.eos_id, self.unk_id, self.start_id}

    def piece(self, token: int) -> str | None:
        """Returns the vocabulary's name of an id."""
        if (number := self._sentinel_numbers.get(token)) is not None:
            return f"<extra_id_{number}>"
        return self._tokenizer.id_to_token(token)

    def _decode_run(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def train_model(lines: Iterable[str], config: BytePairConfig, modes: Sequence[str] = ()) -> bytes:
    """Trains a tokenizer and returns its `tokenizer.json`; equal lines give equal bytes.

    Each of `modes` becomes a token that `encode` never returns. Raises UserError, with the nearest possible size, if
    the text cannot fill `config.vocab_size`, or if modes and sentinels do not fit in it.
    """
    least = BYTE_PAIR_LEAST + len(modes) + config.sentinels
    if config.vocab_size < least:
        raise UserError(f"tokenizer.vocab_size is {config.vocab_size}; the least, with {len(modes)} modes, is {least}")
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size - config.sentinels,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*TRAINED_SPECIALS, *modes],
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    size = tokenizer.get_vocab_size() + config.sentinels
    if size < config.vocab_size:
        text = "no text" if size == least else "too little text"
        raise UserError(
            f"there is {text} to train the tokenizer on: tokenizer.vocab_size {config.vocab_size} is too large, "
            f"at most {size} is possible"
        )
    return tokenizer.to_str().encode()


def load_byte_pair(path: Path, *, sentinels: int, eos: str | None) -> BytePairTokenizer:
    """Loads a `tokenizer.json`, or a folder that contains one, or `vocab.json` and `merges.txt`.

    Args:
      path: the file or folder.
      sentinels: how many sentinels to append; 0 if the tokenizer has its own.
      eos: the token that ends a text; None: as `tokenizer_config.json` in the same folder names it, or a well-known
        name. The other special tokens are always found that way.

    Targets start with bos; without a bos token with pad, and without pad with eos. Raises UserError if files are
    missing or damaged, or if there is no eos.
    """
    tokenizer, files = read_tokenizer_files(path)
    described = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    names = read_json(described) if described.is_file() else {}
    if not isinstance(names, dict):
        raise UserError(f"{described} is not a JSON object")
    try:
        special = _find_special_ids(tokenizer, names, eos)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return BytePairTokenizer(tokenizer, special, sentinels=sentinels, files=files)


def read_tokenizer_files(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, bytes]]:
    """Returns the tokenizer at `path` (see `load_byte_pair`), and name -> content of the files it was read from."""
    whole = path / SINGLE_FILE if path.is_dir() else path
    parts = [path / name for name in FILE_PAIR]
    by_parts = path.is_dir() and not whole.is_file()
    if by_parts and not all(part.is_file() for part in parts):
        raise UserError(f"tokenizer.path {path} has neither tokenizer.json nor vocab.json and merges.txt")
    try:
        if by_parts:
            return _byte_level(models.BPE.from_file(*map(str, parts))), {part.name: part.read_bytes() for part in parts}
        content = whole.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer.path {path} cannot be read: {error.strerror}") from None
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"tokenizer.path {path} has no byte-pair tokenizer: {error}") from None
    try:
        return tokenizers.Tokenizer.from_buffer(content), {SINGLE_FILE: content}
    except Exception as error:
        raise UserError(f"tokenizer.path {whole} is not a tokenizer.json: {error}") from None


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Returns a tokenizer that splits words by GPT-2's rule and merges their bytes; it is lossless."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _find_special_ids(tokenizer: tokenizers.Tokenizer, names: Mapping[str, Any], eos: str | None) -> SpecialTokens:
    """Returns the special ids by `names`, the content of `tokenizer_config.json`; see `load_byte_pair`."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if eos is not None and eos not in vocabulary:
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        raise UserError(f"tokenizer.eos {eos!r} is not a token; {nearest(eos, special)}")

    def named(role: str) -> int | None:
        name = names.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        if name is not None and not isinstance(name, str):
            raise UserError(f"tokenizer_config.json: {role}_token is {name!r}, not the name of a token")
        candidates = WELL_KNOWN[role] if name is None else (name,)
        return next((vocabulary[name] for name in candidates if name in vocabulary), None)

    before, after = _ids_around_text(tokenizer)
    eos_id = vocabulary[eos] if eos is not None else _first_known(named("eos"), after[0] if after else None)
    if eos_id is None:
        raise UserError("the tokenizer names no token that ends a text; set tokenizer.eos")
    bos, pad = named("bos"), named("pad")
    if not before and names.get("add_bos_token") and bos is not None:
        before = [bos]
    if bos is None and before:
        bos = before[0]
    return SpecialTokens(
        pad=_first_known(pad, eos_id),
        eos=eos_id,
        unk=_first_known(named("unk"), eos_id),
        start=_first_known(bos, pad, eos_id),
        bos=before[0] if len(before) == 1 else None,
    )


def _first_known(*ids: int | None) -> Any:
    """Returns the first id that is not None."""
    return next((token for token in ids if token is not None), None)


def _ids_around_text(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids that the tokenizer's post-processor adds before and after a text."""
    plain, wrapped = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(wrapped) - len(plain) + 1):
        if wrapped[start : start + len(plain)] == plain:
            return wrapped[:start], wrapped[start + len(plain) :]
    return [], []


def _skipped_ids(tokenizer: tokenizers.Tokenizer, special: SpecialTokens) -> frozenset[int]:
    """Returns the ids that decoding skips: special tokens, but unk only if it is also pad, eos, start or bos."""
    added = tokenizer.get_added_tokens_decoder()
    named = {token for token, one in added.items() if one.special}
    structural = {special.pad, special.eos, special.start, special.eos if special.bos is None else special.bos}
    return frozenset(named - {special.unk} | structural)
