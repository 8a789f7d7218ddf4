"""Damaged caches: a damaged entry is named and rebuilt, and no result depends on it."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common.data import sums
from common.data.cache import build_once, put, whole
from common.data.config import BytePairConfig, DataConfig, SentencePieceConfig
from common.data.objectives.config import Supervised
from common.data.sources import indexes
from common.data.sources.config import SourceConfig
from common.data.streams import Host, open_training, open_training_text, open_validation
from common.data.tokenized.prepare import Folder, finish
from common.data.tokenized.prepare import prepare as prepared_in
from common.data.tokenized.prepared import MANIFEST, VARIABLE, find_elsewhere
from common.data.tokenized.shards import REPORT, ShardTask, write_shard
from common.data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from common.errors import UserError
from tests.common.data.memory_source import MemorySource


def flip(path: Path, place: float = 0.5) -> None:
    """Changes one bit, as a failing disk may; the file keeps its size and its time."""
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[int(place * (len(data) - 1))] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def digests(config: DataConfig, cache_dir: Path) -> Iterator[str]:
    """Hashes everything that training reads, read again from the cache."""
    indexes.map_integers.cache_clear()
    tokenizer = open_tokenizer(config.tokenizer, open_training_text(config, cache_dir), cache_dir)
    yield tokenizer.content_hash
    for opened in (open_training, open_validation):
        loader = opened(config, tokenizer, cache_dir, Host())
        yield loader.content
        yield from (f"{loader.batch(step).fingerprint:032x}" for step in range(6))


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    for split, count in (("train", 120), ("validation", 30)):
        rows = [json.dumps({"a": f"what is {n}?", "b": f"it is {n % 7} and {n % 5}"}) for n in range(count)]
        rows[3] = json.dumps({"a": None, "b": "x"})  # a record that cannot be used, so that problems are written
        (tmp_path / f"pairs.{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode(), mtime=0))
    return DataConfig(
        source=SourceConfig(name=f"jsonl:{tmp_path}/pairs.{{split}}.jsonl.gz", inputs="a", targets="b"),
        tokenizer=SentencePieceConfig(vocab_size=280),
        objective=Supervised(),
        rows=2,
        input_length=64,
        target_length=64,
    )


def test_a_flipped_bit_anywhere_in_the_cache_changes_nothing(
    config: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_dir = tmp_path / "cache"
    wanted = list(digests(config, cache_dir))
    files = [path for path in sorted(cache_dir.rglob("*")) if path.is_file() and path.stat().st_size]
    kinds = {path.relative_to(cache_dir).parts[0] for path in files}
    assert kinds == {"indexes", "plans", "tokenized", "tokenizers", "unpacked"}
    entries = [path for path in files if not path.name.startswith(".")]
    assert len(entries) > 15 and len(files) > 2 * len(kinds) + len(entries)
    for number, path in enumerate(files):
        capsys.readouterr()
        flip(path, (number % 5) / 4)
        assert list(digests(config, cache_dir)) == wanted, path
        said = capsys.readouterr().err
        if path in entries:
            entry = cache_dir / "/".join(path.relative_to(cache_dir).parts[:2])
            assert f"{entry} in the cache is damaged" in said and "rebuilt" in said
            assert whole(entry)
        assert list(digests(config, cache_dir)) == wanted
        assert not capsys.readouterr().err, "it was rebuilt once"


@pytest.mark.parametrize("change", ["truncated", "missing", "empty"])
def test_truncated_and_missing_files_are_detected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    def build(folder: Path) -> None:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "file").write_bytes(bytes(1000))
        (folder / "other").write_text("x")

    path = build_once(tmp_path / "thing", build)
    file = path / "deep" / "file"
    if change == "missing":
        file.unlink()
    else:
        os.truncate(file, 999 if change == "truncated" else 0)
    assert not whole(path)
    build_once(path, build)
    assert file.read_bytes() == bytes(1000) and str(file) in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir() if not each.name.startswith(".")) == ["thing"]


def test_a_file_is_hashed_once_on_each_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    file_hash = sums.file_hash

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_hash(path)

    monkeypatch.setattr(sums, "file_hash", counted)
    path = build_once(tmp_path / "thing", lambda part: part.write_text("x"))
    assert len(hashed) == 1
    for _ in range(3):
        assert build_once(path, lambda part: pytest.fail("built again")) == path
    assert len(hashed) == 1
    monkeypatch.setattr(sums.socket, "gethostname", lambda: "another")
    for _ in range(3):
        assert whole(path)
    assert len(hashed) == 2


def test_entries_of_an_earlier_version_are_rebuilt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thing").write_text("old")
    assert build_once(tmp_path / "thing", lambda part: part.write_text("new")).read_text() == "new"
    assert "from an earlier version" in capsys.readouterr().err
    (tmp_path / "part").write_text("newer")
    put(tmp_path / "part", tmp_path / "thing")
    assert whole(tmp_path / "thing") and (tmp_path / "thing").read_text() == "newer"


@pytest.fixture
def task(tmp_path: Path) -> ShardTask:
    source = MemorySource([{"text": f"number {n} of many"} for n in range(40)])
    config = BytePairConfig(vocab_size=270)
    tokenizer: Tokenizer = open_tokenizer(config, source, tmp_path)
    return ShardTask(
        source=source, fields=("text",), tokenizer=tokenizer, end_each=True, strict=False, records_a_shard=10
    )


def test_only_intact_shards_of_a_killed_process_are_kept(task: ShardTask, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "tokens")
    intact = prepared_in(task, tmp_path / "expected", workers=1)
    for shard in range(3):
        folder.write(shard, task, lambda done: None)
    part = folder._part
    flip(part / "00000.text.tokens.npy")
    (part / "00001.text.offsets.npy").unlink()
    flip(part / REPORT.format(shard=2), 0.0)
    made = prepared_in(task, tmp_path / "tokens", workers=1)
    assert made.manifest == intact.manifest
    for record in range(40):
        np.testing.assert_array_equal(made.fields["text"][record], intact.fields["text"][record])


def test_a_complete_folder_that_was_not_moved_is_checked(task: ShardTask, tmp_path: Path) -> None:
    for damaged in (False, True):
        folder = Folder(tmp_path / f"tokens {damaged}")
        folder._part.mkdir(parents=True)
        reports = [write_shard(shard, task, folder._part) for shard in range(task.shards())]
        finish(task, folder._part, reports)
        if damaged:
            flip(folder._part / "00003.text.tokens.npy")
        before = task.source.reads  # type: ignore[attr-defined]
        made = prepared_in(task, folder.path, workers=1)
        assert (task.source.reads > before) == damaged  # type: ignore[attr-defined]
        assert task.tokenizer.decode(made.fields["text"][39]) == "number 39 of many"


def test_tokens_of_an_earlier_version_are_adopted_if_their_hashes_match(task: ShardTask, tmp_path: Path) -> None:
    for damaged in (False, True):
        made = prepared_in(task, tmp_path / "tokens", workers=1)
        for hidden in tmp_path.glob(".tokens.sums*"):
            hidden.unlink()
        if damaged:
            flip(tmp_path / "tokens" / "00001.text.tokens.npy")
        before = task.source.reads  # type: ignore[attr-defined]
        again = prepared_in(task, tmp_path / "tokens", workers=1)
        assert (task.source.reads > before) == damaged  # type: ignore[attr-defined]
        assert again.manifest == made.manifest and whole(tmp_path / "tokens")


@pytest.mark.parametrize("name", ["00002.text.tokens.npy", "00002.text.offsets.npy"])
def test_damaged_prepared_data_are_named(
    task: ShardTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    prepared_in(task, tmp_path / "elsewhere" / task.key(), workers=1)
    flip(tmp_path / "elsewhere" / task.key() / name)
    found = find_elsewhere(task.key(), task.identity(), tmp_path / "cache")
    assert found is not None
    assert task.tokenizer.decode(found.fields["text"][0]) == "number 0 of many"
    with pytest.raises(UserError, match=f"{name} is damaged"):
        found.fields["text"][20]


def test_a_manifest_with_wrong_counts_is_detected(
    task: ShardTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    prepared_in(task, tmp_path / task.key(), workers=1)
    manifest = json.loads((tmp_path / task.key() / MANIFEST).read_text())
    manifest["shards"][0]["kept"] -= 1
    (tmp_path / task.key() / MANIFEST).write_text(json.dumps(manifest))
    found = find_elsewhere(task.key(), task.identity(), tmp_path / "cache")
    assert found is not None
    with pytest.raises(UserError, match="offsets.npy is damaged: it does not hold the 10 numbers"):
        found.fields["text"][0]
