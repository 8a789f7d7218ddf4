"""Fixtures of tests that read text through a tokenizer."""

import json
from pathlib import Path

import pytest

from common.data.config import SentencePieceConfig
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
from tests.common.data.stream_configs import LINES


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_model(LINES, SentencePieceConfig(vocab_size=277)), sentinels=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text and JSONL files with the splits of `stream_configs`."""
    folder = tmp_path_factory.mktemp("text")
    for split, lines in (("train", LINES), ("validation", LINES[:40])):
        (folder / f"lines.{split}.txt").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"few.{split}.txt").write_text("".join(f"other words {n} here\n" for n in range(20)))
        rows = [json.dumps({"a": str(n), "b": f"it is {n}", "label": n % 2}) for n in range(100)]
        (folder / f"pairs.{split}.jsonl").write_text("\n".join(rows))
    return folder
