"""Fixtures of tests that write tokens to a bucket in memory."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from common.data.config import SentencePieceConfig
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
from tests.common.data.tokenized.remote_tasks import TEXTS


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_model(TEXTS, SentencePieceConfig(vocab_size=277)), sentinels=20)


@pytest.fixture
def bucket() -> Iterator[MemoryFileSystem]:
    """The file system behind `memory://` URLs, emptied after each test."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each file was fetched, by name."""
    seen: Counter[str] = Counter()
    get_file = MemoryFileSystem.get_file

    def counting(self: MemoryFileSystem, url: str, *rest: Any, **named: Any) -> Any:
        seen[url.rsplit("/", 1)[1]] += 1
        return get_file(self, url, *rest, **named)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counting)
    return seen
