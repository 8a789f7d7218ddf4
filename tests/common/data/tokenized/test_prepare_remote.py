"""Tokens at an url: sent shard by shard and whole or not at all, fetched by those who read them, and never damaged."""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

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
from common.data.sources.records import Problem, Record
from common.data.streams import Host, open_records, open_training, open_validation, shard_tasks
from common.data.tokenized import prepare as module
from common.data.tokenized.prepare import make, open_tokenized, prepare, write_all
from common.data.tokenized.prepared import VARIABLE
from common.data.tokenized.remote import Remote, check_destination, destination
from common.data.tokenized.remote_folder import RemoteFolder
from common.data.tokenized.shards import ShardTask
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
from common.errors import UserError
from tests.common.data.memory_source import MemorySource

BASE = "memory://bucket/corpus"
TEXTS = [f"{n} is {n + 1} less one" * (n % 3) for n in range(100)]
SHARDS = 7


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_model(TEXTS, SentencePieceConfig(vocab_size=277)), sentinels=20)


@pytest.fixture(autouse=True)
def bucket() -> Iterator[MemoryFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was fetched, by name."""
    seen: Counter[str] = Counter()
    get_file = MemoryFileSystem.get_file

    def counting(self: MemoryFileSystem, url: str, *rest: Any, **named: Any) -> Any:
        seen[url.rsplit("/", 1)[1]] += 1
        return get_file(self, url, *rest, **named)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counting)
    return seen


def task_of(
    tokenizer: SentencePieceTokenizer, records: list[Record | Problem] | None = None, strict: bool = False
) -> ShardTask:
    source = MemorySource([{"text": text} for text in TEXTS] if records is None else records)
    return ShardTask(
        source=source, fields=("text",), tokenizer=tokenizer, end_each=False, strict=False, records_a_shard=16
    )


def send(task: ShardTask, base: str = BASE, workers: int = 1) -> dict:
    return make(task, destination(base, task), lambda task, to: write_all(task, to, workers))


def at(base: str, task: ShardTask) -> dict[str, bytes]:
    """All files that lie at an url."""
    system = fsspec.filesystem(base.partition(":")[0])
    return {name.rsplit("/", 1)[1]: system.cat_file(name) for name in system.find(f"{base}/{task.key()}")}


def here(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("protocol", "workers"), [("memory", 1), ("file", 1), ("file", 2)])
def test_the_same_bytes_lie_at_an_url(
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
    assert send(task, base) == manifest and task.source.reads == 0, "all is there"  # type: ignore[attr-defined]


@pytest.mark.parametrize("dies_at", ["00004.text.offsets.npy", "00004.json", "problems.jsonl", "manifest.json"])
def test_an_upload_that_was_killed_goes_on(
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
            bucket.pipe_file(self.at(path.name), path.read_bytes()[:7])  # half of it had arrived
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
    assert module.find_elsewhere(task.key(), task.identity(), tmp_path) is None, "no manifest, no corpus"
    monkeypatch.setattr(RemoteFolder, "send", send_file)
    monkeypatch.setattr(RemoteFolder, "send_json", send_json)
    task.source.reads = 0  # type: ignore[misc]
    send(task)
    read = len(TEXTS) - 4 * len(TEXTS) // SHARDS if dies_at.startswith("00004") else 0
    assert task.source.reads == read, "shards whose reports were there are not made again"  # type: ignore[attr-defined]
    assert at(BASE, task) == here(tmp_path / "here")


def test_only_what_is_read_is_fetched(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]
) -> None:
    task = task_of(tokenizer)
    records = [tokenizer.encode(text).tolist() for text in TEXTS]
    send(task)
    monkeypatch.setenv(VARIABLE, BASE)
    stream = open_tokenized(task, tmp_path).fields["text"]
    assert (len(stream), stream.tokens) == (len(TEXTS), sum(map(len, records)))
    assert not fetched, "counts are the manifest's"
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
    assert set(fetched.values()) == {1} and fetched.total() == 2 * SHARDS, "what was fetched is kept"


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

    def read(number: int) -> list[int]:
        together.wait()
        return streams[number % 2].slice(0, streams[0].tokens).tolist()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(8)))
    assert all(each == found[0] for each in found) and len(found[0]) == streams[0].tokens
    assert set(fetched.values()) == {1} and fetched.total() == SHARDS
    assert not capsys.readouterr().err, "nobody waits for another process"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda data: b""])
def test_what_arrives_damaged_is_refused(
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
    assert "00002.text.tokens.npy" not in kept, "what is damaged is not kept"
    system.pipe_file(url, whole)
    place = task.records(2).start + 1
    assert stream[place].tolist() == tokenizer.encode(TEXTS[place]).tolist()
    system.rm_file(f"{BASE}/{task.key()}/00000.text.tokens.npy")
    with pytest.raises(UserError, match="00000.text.tokens.npy cannot be read"):
        stream[1]


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_what_lies_ready_is_not_made(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    task = task_of(tokenizer)
    base = BASE if kind == "url" else str(tmp_path / "ready")
    send(task, base)
    monkeypatch.setenv(VARIABLE, base)
    task.source.reads = 0  # type: ignore[misc]
    prepared = open_tokenized(task, tmp_path / "cache")
    assert task.source.reads == 0 and not (tmp_path / "cache" / "tokenized").exists()  # type: ignore[attr-defined]
    assert str(prepared.where) == f"{base}/{task.key()}"
    stream = prepared.fields["text"]
    assert [stream[i].tolist() for i in range(len(stream))] == [tokenizer.encode(text).tolist() for text in TEXTS]
    assert any((tmp_path / "cache").rglob("*.npy")) == (kind == "url"), "a folder is read in place"


def test_what_does_not_lie_ready_is_made_and_that_is_said(
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
        f"memory 1 is not in {BASE} and is tokenised here; its key is {task.key()}"
    ], "once: later it is in the cache"


def test_records_left_out_are_known_from_afar(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str]
) -> None:
    records: list[Record | Problem] = [{"text": text} for text in TEXTS]
    records[3], records[40] = Problem("x.jsonl line 4", "not JSON"), Problem("x.jsonl line 41", "not JSON")
    task = task_of(tokenizer, records)
    send(task)
    monkeypatch.setenv(VARIABLE, BASE)
    prepared = open_tokenized(task, tmp_path)
    good = [i for i in range(100) if i not in (3, 40)]
    assert [prepared.source_index(place) for place in range(98)] == good
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
        (lambda task: rewritten(task, source="memory 2"), "manifest.json tells of another source"),
        (lambda task: rewritten(task, format=1), "manifest.json tells of another source, tokenizer or format"),
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
def test_a_manifest_of_something_else(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, manifest: Any, message: str
) -> None:
    task = task_of(tokenizer)
    send(task)
    monkeypatch.setenv(VARIABLE, BASE)
    fsspec.filesystem("memory").pipe_file(f"{BASE}/{task.key()}/manifest.json", manifest(task))
    with pytest.raises(UserError, match=message):
        open_tokenized(task, tmp_path)


def test_a_folder_that_is_wrong(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, base = task_of(tokenizer), tmp_path / "ready"
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
def test_destinations_that_cannot_be(tmp_path: Path, to: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        check_destination(to.format(tmp=tmp_path))


def test_a_bucket_that_refuses(tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object, **named: object) -> None:
        raise OSError("403: you may not\nat all")

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuses)
    with pytest.raises(UserError, match=r"00000.text.offsets.npy cannot be written: 403: you may not$"):
        send(task_of(tokenizer))


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
    """A hash of the first batches of both streams, and of what their fingerprints say."""
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


@pytest.mark.parametrize("name", STREAMS)
def test_batches_do_not_tell_where_tokens_lie(
    folder: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, fetched: Counter[str], name: str
) -> None:
    """Made when they are read, or ahead: in the cache, in a folder, at an url; and ahead means all of it."""
    config = STREAMS[name](folder)
    lazily = batches(config, tokenizer, folder / "lazily")
    for _, task in shard_tasks(config, tokenizer, folder / "ahead"):
        open_tokenized(task, folder / "ahead", workers=1)
        for base in (BASE, str(folder / "ready")):
            send(task, base)

    def refuses(number: int, *rest: object) -> None:
        raise AssertionError(f"shard {number} was not made ahead")

    monkeypatch.setattr(module, "write_shard", refuses)
    assert batches(config, tokenizer, folder / "ahead") == lazily
    for base in (str(folder / "ready"), BASE):
        monkeypatch.setenv(VARIABLE, base)
        assert not fetched
        assert batches(config, tokenizer, folder / f"other-{base[:4]}".replace("/", "_")) == lazily
    assert fetched
    if not isinstance(config.objective, Supervised | CausalLM):
        assert not [name for name in fetched if "offsets" in name], "pieces of text need no records' bounds"


def test_jobs_are_all_splits_of_all_parts_once(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    def names(name: str, *more: str) -> list[str]:
        return [split for split, _ in shard_tasks(STREAMS[name](folder), tokenizer, folder, more)]

    assert names("supervised", "validation") == ["train", "validation"]
    assert names("supervised", "train[:10]") == ["train", "validation", "train[:10]"]
    assert names("ul2r") == ["train", "validation"], "all its objectives read the same tokens"
    assert names("two-ways") == ["train", "train", "validation", "validation"], "one reads an eos behind each"
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
