"""Tokens at a URL: sent shard by shard, whole or not at all, fetched when they are read, and never damaged."""

import concurrent.futures
import dataclasses
import json
import logging
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from common.data.sources.records import Problem, Record
from common.data.tokenized import prepare as module
from common.data.tokenized.prepare import open_tokenized, prepare
from common.data.tokenized.prepared import VARIABLE
from common.data.tokenized.remote import check_destination
from common.data.tokenized.remote_folder import RemoteFolder
from common.data.tokenized.shards import ShardTask
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.errors import UserError
from tests.common.data.tokenized.remote_tasks import BASE, SHARDS, TEXTS, send, task_of

pytestmark = pytest.mark.usefixtures("bucket")


def at(base: str, task: ShardTask) -> dict[str, bytes]:
    """Reads all files of a task at a URL."""
    system = fsspec.filesystem(base.partition(":")[0])
    return {name.rsplit("/", 1)[1]: system.cat_file(name) for name in system.find(f"{base}/{task.key()}")}


def here(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("protocol", "workers"), [("memory", 1), ("file", 1), ("file", 2)])
def test_a_url_gets_the_same_bytes(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, protocol: str, workers: int
) -> None:
    records: list[Record | Problem] = [{"text": text} for text in TEXTS]
    records[40] = Problem("x.jsonl line 41", "not JSON")
    task = task_of(tokenizer, records)
    base = BASE if protocol == "memory" else f"file://{tmp_path}/there"
    prepare(task, tmp_path / "here", workers=1)
    manifest = send(task, base, workers)
    assert at(base, task) == here(tmp_path / "here")
    assert manifest == json.loads((tmp_path / "here" / "manifest.json").read_text())
    task.source.reads = 0  # type: ignore[misc]
    assert send(task, base) == manifest and task.source.reads == 0, "everything is there"  # type: ignore[attr-defined]


@pytest.mark.parametrize("dies_at", ["00004.text.offsets.npy", "00004.json", "problems.jsonl", "manifest.json"])
def test_a_killed_upload_is_resumed(
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    bucket: MemoryFileSystem,
    dies_at: str,
) -> None:
    task = task_of(tokenizer)
    prepare(task, tmp_path / "here", workers=1)
    monkeypatch.setenv(VARIABLE, BASE)
    send_file, send_json = RemoteFolder.send, RemoteFolder.send_json

    def dying(self: RemoteFolder, path: Path) -> None:
        if path.name == dies_at:
            bucket.pipe_file(self.at(path.name), path.read_bytes()[:7])  # half of it arrives
            raise KeyboardInterrupt
        send_file(self, path)

    def dying_json(self: RemoteFolder, name: str, value: object) -> None:
        if name == dies_at:
            raise KeyboardInterrupt
        send_json(self, name, value)

    monkeypatch.setattr(RemoteFolder, "send", dying)
    monkeypatch.setattr(RemoteFolder, "send_json", dying_json)
    with pytest.raises(KeyboardInterrupt):
        send(task)
    assert module.find_elsewhere(task.key(), task.identity(), tmp_path) is None, "without a manifest there is no corpus"
    monkeypatch.setattr(RemoteFolder, "send", send_file)
    monkeypatch.setattr(RemoteFolder, "send_json", send_json)
    task.source.reads = 0  # type: ignore[misc]
    send(task)
    read = len(TEXTS) - 4 * len(TEXTS) // SHARDS if dies_at.startswith("00004") else 0
    assert task.source.reads == read, "shards with reports are not made again"  # type: ignore[attr-defined]
    assert at(BASE, task) == here(tmp_path / "here")


def test_files_are_fetched_only_when_read(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]
) -> None:
    task = task_of(tokenizer)
    records = [tokenizer.encode(text).tolist() for text in TEXTS]
    send(task)
    monkeypatch.setenv(VARIABLE, BASE)
    stream = open_tokenized(task, tmp_path).fields["text"]
    assert (len(stream), stream.tokens) == (len(TEXTS), sum(map(len, records)))
    assert not fetched, "counts come from the manifest"
    joined = [token for record in records for token in record]
    first = sum(map(len, records[: task.records(3).start]))
    assert stream.slice(first + 2, first + 9).tolist() == joined[first + 2 : first + 9]
    assert fetched == {"00003.text.tokens.npy": 1}
    assert stream.slice(first - 4, first + 9).tolist() == joined[first - 4 : first + 9]
    assert fetched == {"00003.text.tokens.npy": 1, "00002.text.tokens.npy": 1}
    last = task.records(6)
    assert stream.lengths(np.array(last)).tolist() == [len(records[i]) for i in last]
    assert stream[last.start].tolist() == records[last.start]
    assert fetched.total() == 4 and {"00006.text.offsets.npy", "00006.text.tokens.npy"} <= set(fetched)
    again = open_tokenized(task, tmp_path).fields["text"]
    assert [again[i].tolist() for i in range(len(TEXTS))] == records
    assert set(fetched.values()) == {1} and fetched.total() == 2 * SHARDS, "fetched files are kept"


def test_threads_fetch_a_file_once(
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    fetched: Counter[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = task_of(tokenizer)
    send(task)
    monkeypatch.setenv(VARIABLE, BASE)
    streams = [open_tokenized(task, tmp_path).fields["text"] for _ in range(2)]
    together = threading.Barrier(8)

    def read(thread: int) -> list[int]:
        together.wait()
        return streams[thread % 2].slice(0, streams[0].tokens).tolist()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(8)))
    assert all(each == found[0] for each in found) and len(found[0]) == streams[0].tokens
    assert set(fetched.values()) == {1} and fetched.total() == SHARDS
    assert not capsys.readouterr().err, "no process waits for another"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda data: b""])
def test_a_damaged_file_is_refused(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    task = task_of(tokenizer)
    send(task)
    monkeypatch.setenv(VARIABLE, BASE)
    url = f"{BASE}/{task.key()}/00002.text.tokens.npy"
    system = fsspec.filesystem("memory")
    whole = system.cat_file(url)
    system.pipe_file(url, damage(whole))
    stream = open_tokenized(task, tmp_path).fields["text"]
    for _ in range(2):
        with pytest.raises(UserError, match=f"{url} is damaged"):
            stream[task.records(2).start + 1]
    kept = [path.name[33:] for path in (tmp_path / "prepared").glob("*/*.npy")]
    assert "00002.text.tokens.npy" not in kept, "a damaged file is not kept"
    system.pipe_file(url, whole)
    place = task.records(2).start + 1
    assert stream[place].tolist() == tokenizer.encode(TEXTS[place]).tolist()
    system.rm_file(f"{BASE}/{task.key()}/00000.text.tokens.npy")
    with pytest.raises(UserError, match="00000.text.tokens.npy cannot be read"):
        stream[1]


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_prepared_tokens_are_not_made_again(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    task = task_of(tokenizer)
    base = BASE if kind == "url" else str(tmp_path / "prepared")
    send(task, base)
    monkeypatch.setenv(VARIABLE, base)
    task.source.reads = 0  # type: ignore[misc]
    prepared = open_tokenized(task, tmp_path / "cache")
    assert task.source.reads == 0 and not (tmp_path / "cache" / "tokenized").exists()  # type: ignore[attr-defined]
    assert str(prepared.where) == f"{base}/{task.key()}"
    stream = prepared.fields["text"]
    assert [stream[i].tolist() for i in range(len(stream))] == [tokenizer.encode(text).tolist() for text in TEXTS]
    assert any((tmp_path / "cache").rglob("*.npy")) == (kind == "url"), "a folder is read in place"


def test_tokens_that_are_not_prepared_are_made_with_a_warning(
    tmp_path: Path,
    tokenizer: SentencePieceTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = task_of(tokenizer)
    monkeypatch.setenv(VARIABLE, BASE)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            prepared = open_tokenized(task, tmp_path, workers=1)
    assert prepared.where == tmp_path / "tokenized" / task.key()
    assert [line.getMessage() for line in caplog.records] == [
        f"memory 1 is not in {BASE} and is tokenised on this machine; its key is {task.key()}"
    ], "only once: then it is in the cache"


def test_skipped_records_are_known_at_a_url(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]
) -> None:
    records: list[Record | Problem] = [{"text": text} for text in TEXTS]
    records[3], records[40] = Problem("x.jsonl line 4", "not JSON"), Problem("x.jsonl line 41", "not JSON")
    task = task_of(tokenizer, records)
    send(task)
    monkeypatch.setenv(VARIABLE, BASE)
    prepared = open_tokenized(task, tmp_path)
    good = [i for i in range(100) if i not in (3, 40)]
    assert [prepared.source_record(place) for place in range(98)] == good
    assert fetched == {"00000.kept.npy": 1, "00002.kept.npy": 1}
    strict = dataclasses.replace(task, strict=True)
    with pytest.raises(UserError, match="x.jsonl line 4: not JSON"):
        open_tokenized(strict, tmp_path)
    with pytest.raises(UserError, match="x.jsonl line 4: not JSON"):
        send(strict)


def rewritten(task: ShardTask, **change: object) -> bytes:
    return json.dumps(json.loads(at(BASE, task)["manifest.json"]) | change).encode()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (lambda task: b"{", "manifest.json cannot be read: Expecting"),
        (lambda task: b"[]", "manifest.json is damaged"),
        (lambda task: rewritten(task, source="memory 2"), "manifest.json is of another source"),
        (lambda task: rewritten(task, format=1), "manifest.json is of another source, tokenizer or format"),
        (lambda task: rewritten(task, shards=[{}]), "manifest.json is damaged"),
        (lambda task: rewritten(task, shards=3), "manifest.json is damaged"),
        (
            lambda task: rewritten(task, shards=[{"hashes": {"x.npy": "../" * 9}, "kept": 1, "tokens": {"text": 1}}]),
            "manifest.json is damaged",
        ),
        (
            lambda task: rewritten(task, shards=[{"hashes": {"/../x": "0" * 32}, "kept": 1, "tokens": {"text": 1}}]),
            "manifest.json names '/../x', which is outside its folder",
        ),
    ],
)
def test_a_wrong_manifest_is_refused(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, manifest: Any, message: str
) -> None:
    task = task_of(tokenizer)
    send(task)
    monkeypatch.setenv(VARIABLE, BASE)
    fsspec.filesystem("memory").pipe_file(f"{BASE}/{task.key()}/manifest.json", manifest(task))
    with pytest.raises(UserError, match=message):
        open_tokenized(task, tmp_path)


def test_a_missing_or_incomplete_folder_is_refused(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, base = task_of(tokenizer), tmp_path / "prepared"
    monkeypatch.setenv(VARIABLE, str(base))
    with pytest.raises(UserError, match=f"{VARIABLE} is {base}: no such folder"):
        open_tokenized(task, tmp_path)
    send(task, str(base))
    (base / task.key() / "00003.text.offsets.npy").unlink()
    with pytest.raises(UserError, match="00003.text.offsets.npy is missing"):
        open_tokenized(task, tmp_path)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("nosuch://x", "unknown protocol"),
        ("{tmp}/file/below", "cannot be created: .*file is a file"),
    ],
)
def test_impossible_destinations_are_refused(tmp_path: Path, to: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        check_destination(to.format(tmp=tmp_path))


def test_a_bucket_that_refuses_writes_is_an_error(
    tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: object, **named: object) -> None:
        raise OSError("403: you may not\nat all")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuses)
    with pytest.raises(UserError, match=r"00000.text.offsets.npy cannot be written: 403: you may not$"):
        send(task_of(tokenizer))
