"""Streams over prepared tokens: the same batches wherever the tokens are, and the texts of scored splits."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.config import DataConfig, SentencePieceConfig
from common.data.objectives.config import (
    UL2R,
    CausalLM,
    FullLM,
    Mixture,
    MixturePart,
    Objective,
    SpanCorruption,
    Supervised,
)
from common.data.sources.config import SourceConfig, SourceMixture
from common.data.streams import Host, open_records, open_training, open_validation, shard_tasks
from common.data.tokenized import prepare as module
from common.data.tokenized.prepare import open_tokenized
from common.data.tokenized.prepared import VARIABLE
from common.data.tokenized.remote import Remote, destination
from common.data.tokenized.remote_folder import RemoteFolder
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.errors import UserError
from tests.common.data.tokenized.remote_tasks import BASE, TEXTS, send

pytestmark = pytest.mark.usefixtures("bucket")


def text(folder: Path, name: str = "lines") -> SourceConfig:
    return SourceConfig(name=f"text:{folder}/{name}.{{split}}.txt", inputs=None, targets=None, text="text")


def config_of(source: SourceConfig | SourceMixture, objective: Objective, input_length: int = 64) -> DataConfig:
    return DataConfig(
        source=source,
        objective=objective,
        tokenizer=SentencePieceConfig(path="given"),
        rows=4,
        input_length=input_length,
        target_length=64,
    )


BOTH = Mixture(
    parts=(
        MixturePart(objective=FullLM(), rate=0.5, mode="a"),
        MixturePart(objective=SpanCorruption(), rate=0.5, mode="b"),
    )
)
STREAMS: dict[str, Any] = {
    "supervised": lambda folder: config_of(
        SourceConfig(name=f"jsonl:{folder}/pairs.{{split}}.jsonl", inputs="a", targets="b"), Supervised()
    ),
    "documents": lambda folder: config_of(text(folder), CausalLM(), 0),
    "spans": lambda folder: config_of(text(folder), SpanCorruption()),
    "ul2r": lambda folder: config_of(text(folder), UL2R()),
    "two-ways": lambda folder: config_of(text(folder), BOTH),
    "sources": lambda folder: config_of(SourceMixture(parts=(text(folder), text(folder, "few"))), SpanCorruption()),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, lines in (("train", TEXTS), ("validation", TEXTS[:40])):
        (tmp_path / f"lines.{split}.txt").write_text("".join(f"{line}\n" for line in lines))
        (tmp_path / f"few.{split}.txt").write_text("".join(f"other {line}\n" for line in lines[:20]))
        rows = [json.dumps({"a": line, "b": f"is {n}"}) for n, line in enumerate(lines)]
        (tmp_path / f"pairs.{split}.jsonl").write_text("\n".join(rows))
    return tmp_path


def batches(config: DataConfig, tokenizer: SentencePieceTokenizer, cache: Path) -> str:
    """Hashes the first batches of both streams, with their fingerprints."""
    digest = hashlib.sha256()
    for loader in (
        open_training(config, tokenizer, cache, Host()),
        open_validation(config, tokenizer, cache, Host()),
    ):
        for step in range(5):
            made = loader.batch(step)
            digest.update(str(made.fingerprint).encode())
            for field in dataclasses.fields(made.batch):
                digest.update(np.ascontiguousarray(getattr(made.batch, field.name)).tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("supervised", "spans", "sources") else pytest.mark.slow)
        for name in STREAMS
    ],
)
def test_batches_do_not_depend_on_where_tokens_are(
    folder: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str], name: str
) -> None:
    """Tokens are made on demand or ahead, in the cache, in a folder or at a URL; ahead makes every shard."""
    config = STREAMS[name](folder)
    lazily = batches(config, tokenizer, folder / "lazily")
    for _, task in shard_tasks(config, tokenizer, folder / "ahead"):
        open_tokenized(task, folder / "ahead", workers=1)
        for base in (BASE, str(folder / "prepared")):
            send(task, base)

    def refuses(shard: int, *rest: object) -> None:
        raise AssertionError(f"shard {shard} was not made ahead")

    monkeypatch.setattr(module, "write_shard", refuses)
    assert batches(config, tokenizer, folder / "ahead") == lazily
    for base in (str(folder / "prepared"), BASE):
        monkeypatch.setenv(VARIABLE, base)
        assert not fetched
        assert batches(config, tokenizer, folder / f"other-{base[:4]}".replace("/", "_")) == lazily
    assert fetched
    if not isinstance(config.objective, Supervised | CausalLM):
        assert not [name for name in fetched if "offsets" in name], "pieces of text need no bounds of records"


def test_tasks_are_all_splits_of_all_parts_once(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    def names(name: str, *more: str) -> list[str]:
        return [split for split, _ in shard_tasks(STREAMS[name](folder), tokenizer, folder, more)]

    assert names("supervised", "validation") == ["train", "validation"]
    assert names("supervised", "train[:10]") == ["train", "validation", "train[:10]"]
    assert names("ul2r") == ["train", "validation"], "all its objectives read the same tokens"
    assert names("two-ways") == ["train", "train", "validation", "validation"], "one has an eos after each record"
    of = [f"of {text(folder, part).name}" for part in ("lines", "few")]
    assert names("sources") == [f"train {of[0]}", f"validation {of[0]}", f"train {of[1]}", f"validation {of[1]}"]
    with pytest.raises(UserError, match="no split 'tset'"):
        names("supervised", "tset")
    few = SentencePieceTokenizer(tokenizer.serialized())
    with pytest.raises(UserError, match="needs 3 sentinels"):
        shard_tasks(STREAMS["spans"](folder), few, folder)


def test_texts_of_scored_splits_are_found(
    folder: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = STREAMS["supervised"](folder)
    for _, task in shard_tasks(config, tokenizer, folder / "ahead", ("train[10:20]",)):
        send(task)
    monkeypatch.setenv(VARIABLE, BASE)
    records = open_records(config, config.source, "train[10:20]", tokenizer, folder / "here")
    assert isinstance(records.prepared.where, RemoteFolder) and isinstance(destination(BASE, task), Remote)
    assert [records.text(i)["targets"] for i in range(10)] == [f"is {n}" for n in range(10, 20)]
    assert tokenizer.decode(records.examples.make(np.array([4]))[0].targets_T) == "is 14"
