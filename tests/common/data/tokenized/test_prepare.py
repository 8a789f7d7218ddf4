"""Tokenising into shards: the same bytes by any route, resumed after a kill, and no record skipped silently."""

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data.config import SentencePieceConfig
from common.data.sources.records import Problem, Record
from common.data.tokenized import prepare as module
from common.data.tokenized import shards
from common.data.tokenized.prepare import prepare
from common.data.tokenized.prepared import Prepared
from common.data.tokenized.shards import ShardTask, write_shard
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
from common.errors import UserError
from tests.common.data.memory_source import MemorySource


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    lines = [f"{n} is {n + 1} less one" for n in range(300)]
    return SentencePieceTokenizer(train_model(lines, SentencePieceConfig(vocab_size=277)))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RECORDS_AT_ONCE", 5)


TEXTS = ["", "one", "x" * 40, "größer “ok” 日本", *(f"{n} is less" for n in range(96))]


def task_of(
    tokenizer: SentencePieceTokenizer, records: list[Record | Problem] | None = None, **change: bool
) -> ShardTask:
    source = MemorySource([{"text": text} for text in TEXTS] if records is None else records)
    given = {"end_each": False, "strict": False, **change}
    return ShardTask(source=source, fields=("text",), tokenizer=tokenizer, records_a_shard=16, **given)


def tokens(prepared: Prepared) -> list[list[int]]:
    stream = prepared.fields["text"]
    return [stream[i].tolist() for i in range(len(stream))]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("end_each", [False, True])
def test_shards_hold_every_record_and_are_made_once(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, end_each: bool
) -> None:
    task = task_of(tokenizer, end_each=end_each)
    assert task.shards() == 7
    expected = [[*tokenizer.encode(text).tolist(), *([1] if end_each else [])] for text in TEXTS]
    for _ in range(2):
        prepared = prepare(task, tmp_path / "a", workers=1)
        assert tokens(prepared) == expected
    assert task.source.reads == len(TEXTS), "read from disk the second time"  # type: ignore[attr-defined]
    manifest = prepared.manifest
    assert (manifest["records"], manifest["kept"], manifest["empty"]) == (100, 100, 0 if end_each else 1)
    assert manifest["tokens"] == {"text": sum(map(len, expected))} and not manifest["problems"]
    hashes = {name: value for shard in manifest["shards"] for name, value in shard["hashes"].items()}
    for name, value in hashes.items():
        assert hashlib.blake2b((tmp_path / "a" / name).read_bytes(), digest_size=16).hexdigest() == value
    assert {path.name for path in (tmp_path / "a").glob("*.npy")} == set(hashes)


def test_processes_write_the_same_bytes(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    task = task_of(tokenizer)
    for folder, workers in (("one", 1), ("two", 2)):
        prepare(task, tmp_path / folder, workers)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_a_killed_process_is_resumed(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = task_of(tokenizer)
    whole = prepare(task, tmp_path / "whole", workers=1)
    write = module.write_shard

    def dies(shard: int, *rest: object) -> object:
        if shard == 4:
            (tmp_path / ".a.part" / "00004.text.tokens.npy").write_bytes(b"half a sh")
            raise KeyboardInterrupt
        return write(shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(task, tmp_path / "a", workers=1)
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(module, "write_shard", write)
    task.source.reads = 0  # type: ignore[misc]
    assert tokens(prepare(task, tmp_path / "a", workers=1)) == tokens(whole)
    assert task.source.reads == len(TEXTS) - 4 * len(TEXTS) // 7, "four shards were there"  # type: ignore[attr-defined]
    assert digest(tmp_path / "a") == digest(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_unusable_records_are_named(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[Record | Problem] = [{"text": text} for text in TEXTS]
    records[3] = Problem("x.jsonl line 4", "not JSON")
    records[40] = {"text": "half a \ud83d"}
    records[99] = Problem("x.jsonl line 100", "byte 7 is not UTF-8")
    task = task_of(tokenizer, records)
    with caplog.at_level(logging.WARNING):
        prepared = prepare(task, tmp_path / "a", workers=1)
    good = [i for i in range(100) if i not in (3, 40, 99)]
    assert tokens(prepared) == [tokenizer.encode(TEXTS[i]).tolist() for i in good]
    assert [prepared.source_record(place) for place in range(97)] == good
    places = np.random.default_rng(0).permutation(97)
    assert prepared.source_records(places).tolist() == np.array(good)[places].tolist()
    for outside in (97, -1):
        with pytest.raises(IndexError, match="of 97"):
            prepared.source_record(outside)
    rows = [json.loads(line)["problem"] for line in (tmp_path / "a" / "problems.jsonl").read_text().splitlines()]
    lone = "memory 1 record 40: field 'text' is not valid Unicode (a lone surrogate)"
    assert rows == ["x.jsonl line 4: not JSON", lone, "x.jsonl line 100: byte 7 is not UTF-8"]
    assert [line.getMessage()[:59] for line in caplog.records] == [
        "3 of 100 records of memory 1 cannot be used and are skipped"
    ]
    strict = dataclasses.replace(task, strict=True)
    for folder in ("a", "b"):  # prepared before, or now
        with pytest.raises(UserError, match="x.jsonl line 4: not JSON"):
            prepare(strict, tmp_path / folder, workers=1)
    assert not (tmp_path / "b").exists()


def test_a_source_without_a_usable_record_is_refused(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    task = task_of(tokenizer, [Problem("x.jsonl line 1", "not JSON"), Problem("x.jsonl line 2", "not JSON")])
    for _ in range(2):  # made now, or found
        with pytest.raises(UserError, match="none of memory 1's 2 records can be used; x.jsonl line 1: not JSON"):
            prepare(task, tmp_path / "a", workers=1)


def test_a_script_without_a_main_guard_is_refused(tmp_path: Path) -> None:
    """Its workers would import it, and each wait for the lock that its parent holds."""
    lines = "".join(f"line {n}\n" for n in range(40))
    (tmp_path / "a.txt").write_text(lines)
    script = """
import dataclasses, sys
from pathlib import Path
from common.data.sources.by_name import open_fields
from common.data.tokenized.prepare import prepare
from common.data.tokenized.shards import ShardTask
from common.data.config import SentencePieceConfig
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
here = Path(__file__).parent
source = open_fields(f"text:{here}/a.txt", {"text": "text"}, "train", here / "cache")
tokenizer = SentencePieceTokenizer(train_model(["line 1 2 3"] * 9, SentencePieceConfig(vocab_size=267)))
task = ShardTask(source=source, fields=("text",), tokenizer=tokenizer, end_each=False, strict=False, records_a_shard=10)
prepare(task, here / "tokens", workers=2)
"""
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and 'under `if __name__ == "__main__":`' in done.stderr


@pytest.mark.parametrize("records", [[], [{"text": ""}] * 3])
def test_sources_may_have_no_token(tmp_path: Path, tokenizer: SentencePieceTokenizer, records: list) -> None:
    prepared = prepare(task_of(tokenizer, records), tmp_path / "a", workers=1)
    assert tokens(prepared) == [[]] * len(records) and prepared.fields["text"].tokens == 0


def test_documents_and_vocabularies_may_be_large(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    wide = SentencePieceTokenizer(tokenizer.serialized(), sentinels=70_000)
    text = "12 is 13 less one " * 60_000
    for each in (tokenizer, wide):
        folder = tmp_path / each.content_hash
        prepared = prepare(task_of(each, [{"text": text}, {"text": "5"}]), folder, workers=1)
        assert tokens(prepared) == [each.encode(text).tolist(), each.encode("5").tolist()]
        assert prepared.fields["text"].shards[0].tokens_P.dtype == (np.uint16 if each is tokenizer else np.int32)


def test_the_key_depends_on_everything_the_tokens_depend_on(tokenizer: SentencePieceTokenizer) -> None:
    task = task_of(tokenizer)
    other = SentencePieceTokenizer(tokenizer.serialized(), sentinels=1)
    tasks = [
        task,
        dataclasses.replace(task, tokenizer=other),
        dataclasses.replace(task, end_each=True),
        dataclasses.replace(task, source=MemorySource([], content_id="memory 2")),
        dataclasses.replace(task, fields=("inputs", "targets")),
    ]
    assert len({each.key() for each in tasks}) == len(tasks)
    assert dataclasses.replace(task, strict=True).key() == task.key()


def test_a_shard_with_a_report_is_not_written_again(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    task = task_of(tokenizer)
    first = write_shard(2, task, tmp_path)
    before, reads = digest(tmp_path), task.source.reads  # type: ignore[attr-defined]
    seen: list[int] = []
    assert write_shard(2, task, tmp_path, seen.append) == first
    assert (digest(tmp_path), task.source.reads, sum(seen)) == (before, reads, first.records)  # type: ignore[attr-defined]
