"""Tokenizers saved in a folder: the same one is loaded, or an error is raised."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from common.data.config import BytePairConfig, SentencePieceConfig
from common.data.tokenizers import byte_pair
from common.data.tokenizers.saved import load_saved, saved_files
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError

TEXT = "A cat sat on 12 mats; naïve <extra_id_0> ▁ and </s>."
LINES = [TEXT, "the cat that sat"] * 10


def sentence_piece(_: Path) -> Tokenizer:
    return SentencePieceTokenizer(train_model(LINES, SentencePieceConfig(vocab_size=296, sentinels=9)), sentinels=9)


def trained_pairs(_: Path) -> byte_pair.BytePairTokenizer:
    config = BytePairConfig(vocab_size=280, sentinels=3)
    return byte_pair.BytePairTokenizer.trained(byte_pair.train_model(LINES, config), sentinels=3)


def loaded_pairs(folder: Path) -> Tokenizer:
    """A tokenizer whose eos only the run's config names."""
    model = tokenizers.Tokenizer.from_buffer(byte_pair.train_model(LINES, BytePairConfig(vocab_size=280)))
    model.add_special_tokens(["<stop>"])
    (folder / "some.json").write_text(model.to_str())
    return byte_pair.load_byte_pair(folder / "some.json", sentinels=2, eos="<stop>")


def pairs_in_parts(folder: Path) -> Tokenizer:
    model = json.loads(byte_pair.train_model(LINES, BytePairConfig(vocab_size=280)))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": 280}))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return byte_pair.load_byte_pair(folder, sentinels=0, eos=None)


MAKERS = [sentence_piece, trained_pairs, loaded_pairs, pairs_in_parts]


def write(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_tokenizer_is_loaded(tmp_path: Path, make: Callable[[Path], Tokenizer]) -> None:
    tokenizer = make(tmp_path)
    again = load_saved(write(saved_files(tokenizer), tmp_path / "kept"))
    assert again.content_hash == tokenizer.content_hash
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    for name in ("vocab_size", "table_size", "sentinels", "pad_id", "eos_id", "unk_id", "start_id", "bos_id"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    assert saved_files(again) == saved_files(tokenizer)


@pytest.mark.parametrize("make", MAKERS)
def test_damage_is_an_error(tmp_path: Path, make: Callable[[Path], Tokenizer]) -> None:
    """A file that is missing, truncated or has one changed byte never loads as another tokenizer."""
    files = saved_files(make(tmp_path))
    number = 0
    for name, content in files.items():
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (None, content[:middle], changed):
            number += 1
            folder = write({**files, name: damaged or b""}, tmp_path / str(number))
            if damaged is None:
                (folder / name).unlink()
            with pytest.raises(UserError, match=f"the tokenizer in {folder} is damaged"):
                load_saved(folder)
