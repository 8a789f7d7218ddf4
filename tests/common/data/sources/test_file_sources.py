"""Several files as one source: order, slices, content ids, missing shards, the index, and copies in other processes."""

import concurrent.futures
import copy
import gzip
import json
import multiprocessing
import os
import random
import zlib

import pytest

from common.data.sources import indexes, line_files, records
from common.data.sources.by_name import open_fields, open_source
from common.data.sources.config import SourceConfig
from common.errors import UserError
from tests.common.data.sources.line_data import TEXT, lines, shards, texts


def test_files_are_one_source_in_the_order_of_their_names(tmp_path):
    wanted = shards(tmp_path, [5, 0, 1, 37, 12])
    source = open_fields(f"jsonl:{tmp_path}/a-*.jsonl", TEXT, "train", tmp_path)
    assert texts(source) == wanted
    order = random.Random(0).choices(range(len(wanted)), k=200)
    assert [record["text"] for record in source.read(order)] == [wanted[i] for i in order]
    assert source.read([]) == []
    for index in (-1, len(wanted)):
        with pytest.raises(IndexError):
            source.read([0, index])
    halves = [open_fields(f"jsonl:{tmp_path}/a-*", TEXT, f"train[{part}]", tmp_path) for part in (":11%", "11%:")]
    assert [text for half in halves for text in texts(half)] == wanted
    assert len({half.content_id for half in halves}) == 2


def test_the_content_id_depends_on_the_bytes_not_on_the_folder(tmp_path):
    ids = {}
    for place in ("one", "two", "other"):
        (tmp_path / place).mkdir()
        shards(tmp_path / place, [3, 4])
        if place == "other":
            path = tmp_path / place / "a-00001-of-00002.jsonl"
            path.write_bytes(path.read_bytes().replace(b" 5", b" 6"))
        ids[place] = open_fields(f"jsonl:{tmp_path}/{place}/a-*.jsonl", TEXT, "train", tmp_path).content_id
    assert ids["one"] == ids["two"] != ids["other"]


@pytest.mark.parametrize(
    ("pattern", "missing"),
    [
        ("a-*-of-00007.jsonl", ["a-00002-of-00007.jsonl", "a-00006-of-00007.jsonl"]),
        ("a-*", ["a-00002-of-00007.jsonl", "a-00006-of-00007.jsonl"]),
        ("a-0000[0-4]*", ["a-00002-of-00007.jsonl"]),
        ("a-0000[345]*", []),
        ("a-00003-of-00007.jsonl", []),
    ],
)
def test_missing_shards_of_a_set_are_listed(tmp_path, pattern, missing):
    shards(tmp_path, [2] * 7)
    for number in (2, 6):
        (tmp_path / f"a-0000{number}-of-00007.jsonl").unlink()
    if not missing:
        assert len(open_fields(f"jsonl:{tmp_path}/{pattern}", TEXT, "train", tmp_path)) in (2, 6)
        return
    with pytest.raises(UserError) as error:
        open_fields(f"jsonl:{tmp_path}/{pattern}", TEXT, "train", tmp_path)
    assert f"{len(missing)} of 00007" in str(error.value) and all(name in str(error.value) for name in missing)
    assert str(error.value).partition("missing: ")[2].count("-of-") == len(missing)


def test_a_glob_selects_one_split(tmp_path):
    for split in ("train", "validation"):
        shards(tmp_path, [2, 3], name="c4-" + split + ".{:05}-of-{:05}.json.gz", packer=gzip.compress)
    name = f"jsonl:{tmp_path}/c4-{{split}}.*.json.gz"
    assert len(open_fields(name, TEXT, "validation[:3]", tmp_path)) == 3
    with pytest.raises(UserError, match="no split 'valid'.*did you mean 'validation'"):
        open_fields(name, TEXT, "valid", tmp_path)
    with pytest.raises(UserError, match="its only split is 'train'"):
        open_fields(f"jsonl:{tmp_path}/c4-train.*.json.gz", TEXT, "validation", tmp_path)


def test_opening_again_reads_no_data_until_the_file_changes(tmp_path, monkeypatch):
    shards(tmp_path, [20, 30])
    first = open_fields(f"jsonl:{tmp_path}/a-*", TEXT, "train", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(line_files, "_index_lines", lambda *_: pytest.fail("indexed twice"))
        again = open_fields(f"jsonl:{tmp_path}/a-*", TEXT, "train[:10]", tmp_path / "cache")
        assert texts(again) == texts(first)[:10]
    path = tmp_path / "a-00000-of-00002.jsonl"
    stat = path.stat()
    path.write_bytes(lines(20, 70))  # the same number of bytes
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = open_fields(f"jsonl:{tmp_path}/a-*", TEXT, "train", tmp_path / "cache")
    assert texts(changed)[0] == "größe 70" and changed.content_id != first.content_id


def test_a_pickled_source_has_no_index_and_no_open_file(tmp_path):
    """Copying a source to a worker process costs the same for any number of records."""
    sizes = []
    for count in (1, 40_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        shards(folder, [count])
        source = open_fields(f"jsonl:{folder}/a-*", TEXT, "train", tmp_path / "cache")
        source.read([0])
        sizes.append(len(multiprocessing.reduction.ForkingPickler.dumps(source)))
        assert copy.deepcopy(source).read([0]) == [{"text": "größe 0"}]
    assert abs(sizes[0] - sizes[1]) < 50


def test_threads_and_spawned_processes_read_the_same(tmp_path):
    wanted = shards(tmp_path, [300, 400], name="a-{}-{}.jsonl.gz", packer=gzip.compress)
    source = open_fields(f"jsonl:{tmp_path}/a-*", TEXT, "train", tmp_path / "cache")
    parts = [range(start, len(wanted), 7) for start in range(7)]
    with concurrent.futures.ThreadPoolExecutor(7) as pool:
        found = [[record["text"] for record in part] for part in pool.map(source.read, parts)]
    assert found == [wanted[start::7] for start in range(7)]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as processes:
        assert [r["text"] for r in processes.submit(source.read, parts[3]).result()] == wanted[3::7]


def test_paths_into_objects_and_fields_of_any_name(tmp_path):
    rows = [
        {"q": {"text": "x"}, "answers": [{"text": "y"}], "a.b": "dot", "n": 3, "yes": True, "f": 0.5},
        {"q": {"text": "x2"}, "answers": [], "a.b": "dot2", "n": 4, "yes": False, "f": -1.0},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {"inputs": "q.text", "targets": "answers.0.text", "id": "n", "label": "yes", "score": "f", "group": "a.b"}
    source = open_fields(f"jsonl:{tmp_path}/a.jsonl", fields, "train", tmp_path / "cache")
    assert source[0] == {"inputs": "x", "targets": "y", "id": "3", "label": "True", "score": "0.5", "group": "dot"}
    assert "no field 'answers.0.text' (source.targets)" in source.read([1])[0].what
    for ours, theirs, hint in (("inputs", "q.txt", "q.text"), ("targets", "answers.text", "answers.0.text")):
        with pytest.raises(UserError, match=f"source.{ours}: .* has no field '{theirs}'; did you mean '{hint}'"):
            open_fields(f"jsonl:{tmp_path}/a.jsonl", {ours: theirs}, "train", tmp_path / "cache")
    assert records.pick_fields(rows[0], {"id": "n"}) == {"id": "3"}
    numbers = open_fields(f"jsonl:{tmp_path}/a.jsonl", {"text": "n"}, "train", tmp_path / "cache")
    assert "must be text, not int" in numbers.read([0])[0].what


def test_columns_may_be_in_any_order_but_must_be_in_every_file(tmp_path):
    (tmp_path / "a.tsv").write_text("en\tde\none\teins\n")
    (tmp_path / "b.tsv").write_text("de\ten\nzwei\ttwo\n")
    source = open_source(SourceConfig(name=f"tsv:{tmp_path}/*.tsv", inputs="en", targets="de"), "train", tmp_path)
    assert source.read([0, 1]) == [{"inputs": "one", "targets": "eins"}, {"inputs": "two", "targets": "zwei"}]
    (tmp_path / "c.tsv").write_text("dee\ten\nzwei\ttwo\n")
    with pytest.raises(UserError, match="c.tsv has no field 'de'; did you mean 'dee'"):
        open_fields(f"tsv:{tmp_path}/*.tsv", {"targets": "de"}, "train", tmp_path)
    squeeze = zlib.compressobj(wbits=31)
    (tmp_path / "d.tsv.gz").write_bytes(squeeze.compress(b"en\tde") + squeeze.flush(zlib.Z_FULL_FLUSH))
    with pytest.raises(UserError, match="d.tsv.gz line 1: .*ends in the middle"):
        open_fields(f"tsv:{tmp_path}/d.tsv.gz", {"targets": "de"}, "train", tmp_path)


def test_threads_keep_the_order_and_raise_the_first_error(tmp_path):
    assert indexes.map_in_threads(lambda n: n * n, range(100), "squares") == [n * n for n in range(100)]
    with pytest.raises(ZeroDivisionError):
        indexes.map_in_threads(lambda n: 1 // (n - 50), range(100), "failing")
    assert indexes.map_in_threads(str, [], "nothing") == []
