"""Files of lines at scale: sets of them, packed, in buckets, torn, damaged; nothing is lost silently or read twice."""

import bz2
import concurrent.futures
import contextlib
import copy
import errno
import gzip
import json
import lzma
import multiprocessing
import os
import random
import sys
import zlib
from pathlib import Path

import fsspec
import pyarrow
import pytest

from common.data.sources import indexes, line_files, packed_files, records
from common.data.sources.by_name import open_fields, open_source
from common.data.sources.config import SourceConfig
from common.data.sources.records import Problem
from common.errors import UserError

PACKERS = {
    "gz": gzip.compress,
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lzma.compress,
    "zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}
TEXT = {"text": "text"}
SHARED = Path(os.environ.get("TWINSTACK_SHARED_DATA", "../shared/data"))


def lines(count: int, start: int = 0) -> bytes:
    return "".join(json.dumps({"text": f"größe {i}"}) + "\n" for i in range(start, start + count)).encode()


def texts(source) -> list[str]:
    return [record["text"] for record in source.read(range(len(source)))]


def shards(folder, sizes, name="a-{:05}-of-{:05}.jsonl", packer=None) -> list[str]:
    """Files of so many lines each, and what they hold."""
    done = 0
    for number, size in enumerate(sizes):
        data = lines(size, done)
        (folder / name.format(number, len(sizes))).write_bytes(packer(data) if packer else data)
        done += size
    return [f"größe {i}" for i in range(done)]


def prefix(packed: bytes, ending: str) -> bytes:
    """What a cut file still holds, by other means than those of the source."""
    match ending:
        case "gz":
            return zlib.decompressobj(31).decompress(packed)
        case "bz2":
            return bz2.BZ2Decompressor().decompress(packed)
        case "xz":
            return lzma.LZMADecompressor().decompress(packed)
    out = bytearray()
    with contextlib.suppress(OSError), pyarrow.CompressedInputStream(pyarrow.BufferReader(packed), "zstd") as stream:
        while byte := stream.read(1):
            out += byte
    return bytes(out)


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


def test_the_content_id_is_that_of_the_bytes_wherever_they_lie(tmp_path):
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
def test_missing_members_of_a_set_are_named(tmp_path, pattern, missing):
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


def test_splits_of_globs_are_told_apart(tmp_path):
    for split in ("train", "validation"):
        shards(tmp_path, [2, 3], name="c4-" + split + ".{:05}-of-{:05}.json.gz", packer=gzip.compress)
    name = f"jsonl:{tmp_path}/c4-{{split}}.*.json.gz"
    assert len(open_fields(name, TEXT, "validation[:3]", tmp_path)) == 3
    with pytest.raises(UserError, match="no split 'valid'.*did you mean 'validation'"):
        open_fields(name, TEXT, "valid", tmp_path)
    with pytest.raises(UserError, match="its only split is 'train'"):
        open_fields(f"jsonl:{tmp_path}/c4-train.*.json.gz", TEXT, "validation", tmp_path)


@pytest.mark.parametrize("ending", PACKERS)
def test_packed_files_are_unpacked_once(tmp_path, monkeypatch, ending):
    name = "a-{:05}-of-{:05}.jsonl." + ending
    wanted = shards(tmp_path, [500, 3, 0], name=name, packer=PACKERS[ending])
    cache = tmp_path / "cache"
    first = open_fields(f"jsonl:{tmp_path}/a-*", TEXT, "train", cache)
    assert texts(first) == wanted
    monkeypatch.setattr(packed_files, "_unpack", lambda *_: pytest.fail("unpacked twice"))
    monkeypatch.setattr(line_files, "_index_lines", lambda *_: pytest.fail("indexed twice"))
    assert open_fields(f"jsonl:{tmp_path}/a-*", TEXT, "train", cache).content_id == first.content_id


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("share", [0.0005, 0.3, 0.62, 0.999])
def test_of_a_torn_file_all_whole_lines_are_read_and_the_tear_is_a_problem(tmp_path, ending, share):
    draw = random.Random(1)
    whole = b"".join(json.dumps({"text": draw.randbytes(300).hex()}).encode() + b"\n" for _ in range(700))
    packed = PACKERS[ending](whole)
    cut = packed[: max(int(len(packed) * share), 4)]
    (tmp_path / f"a.jsonl.{ending}").write_bytes(cut)
    there = prefix(cut, ending)
    assert whole.startswith(there)
    source = open_fields(f"jsonl:{tmp_path}/a.jsonl.{ending}", TEXT, "train", tmp_path / "cache")
    *good, tear = source.read(range(len(source)))
    assert [record["text"] for record in good] == [json.loads(line)["text"] for line in there.split(b"\n")[:-1]]
    assert isinstance(tear, Problem) and "ends in the middle of its data" in tear.what
    assert tear.where.endswith(f"a.jsonl.{ending} line {len(good) + 1}")
    with pytest.raises(UserError, match="ends in the middle"):
        source[len(good)]


def test_a_tear_at_the_end_of_a_line_is_a_record_too(tmp_path):
    squeeze = zlib.compressobj(wbits=31)
    (tmp_path / "a.txt.gz").write_bytes(squeeze.compress(b"one\ntwo\n") + squeeze.flush(zlib.Z_FULL_FLUSH))
    source = open_fields(f"text:{tmp_path}/a.txt.gz", TEXT, "train", tmp_path / "cache")
    assert source.read([0, 1]) == [{"text": "one"}, {"text": "two"}] and len(source) == 3
    assert isinstance(source.read([2])[0], Problem)
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\n")
    assert (
        source.files[0].index.digest
        != open_fields(f"text:{tmp_path}/b.txt", TEXT, "train", tmp_path / "cache").content_id.rpartition("-")[2]
    )  # its records differ


@pytest.mark.parametrize("ending", PACKERS)
def test_what_is_not_packed_is_named(tmp_path, ending):
    (tmp_path / f"a.jsonl.{ending}").write_bytes(lines(300))
    with pytest.raises(UserError, match=f"a.jsonl.{ending} is damaged, or not packed as its name says"):
        open_fields(f"jsonl:{tmp_path}/a.jsonl.{ending}", TEXT, "train", tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "unpacked").iterdir() if not p.name.startswith(".")]


def test_a_full_disk_is_no_tear(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(300)))

    def full(path):
        yield lines(2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(packed_files.UNPACKERS, ".gz", full)
        with pytest.raises(UserError, match="a.jsonl.gz cannot be unpacked into .*No space left"):
            open_fields(f"jsonl:{tmp_path}/a.jsonl.gz", TEXT, "train", tmp_path / "cache")
    assert len(open_fields(f"jsonl:{tmp_path}/a.jsonl.gz", TEXT, "train", tmp_path / "cache")) == 300


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/bucket", recursive=True)


def test_files_in_a_bucket_are_fetched_once_and_again_when_they_change(tmp_path, bucket, monkeypatch):
    wanted = shards(tmp_path, [4, 9], name="a-{:05}-of-{:05}.jsonl.gz", packer=gzip.compress)
    for path in tmp_path.glob("a-*"):
        bucket.pipe(f"/bucket/data/{path.name}", path.read_bytes())
    cache = tmp_path / "cache"
    url = "jsonl:memory://bucket/data/a-*.jsonl.gz"
    source = open_fields(url, TEXT, "train", cache)
    assert texts(source) == wanted
    local = open_fields(f"jsonl:{tmp_path}/a-*.jsonl.gz", TEXT, "train", cache)
    assert source.content_id == local.content_id
    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "get_file", lambda *_: pytest.fail("fetched twice"))
        assert open_fields(url, TEXT, "train", cache).content_id == source.content_id
    bucket.pipe("/bucket/data/a-00000-of-00002.jsonl.gz", gzip.compress(lines(5, 100)))
    assert texts(open_fields(url, TEXT, "train", cache))[:5] == [f"größe {i}" for i in range(100, 105)]
    bucket.rm("/bucket/data/a-00001-of-00002.jsonl.gz")
    with pytest.raises(UserError, match="1 of 00002 files are missing: a-00001-of-00002.jsonl.gz"):
        open_fields(url, TEXT, "train", cache)


def test_what_is_not_in_a_bucket_is_named(tmp_path, bucket):
    bucket.pipe("/bucket/train.jsonl", lines(3))
    with pytest.raises(UserError, match="memory://bucket/trian.jsonl: no such file; did you mean 'train.jsonl'"):
        open_fields("jsonl:memory://bucket/trian.jsonl", TEXT, "train", tmp_path)
    with pytest.raises(UserError, match="no split 'test'.*valid: train"):
        open_fields("jsonl:memory://bucket/{split}.jsonl", TEXT, "test", tmp_path)
    with pytest.raises(UserError, match="unknown protocol; did you mean 'memory'"):
        open_fields("jsonl:memoryy://bucket/a", TEXT, "train", tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    known = sys.modules["fsspec.registry"].known_implementations
    monkeypatch.setitem(known, "nowhere", {"class": "gone_fs.core.FileSystem", "err": "install it"})
    with pytest.raises(UserError, match="nowhere://b/a.jsonl: nowhere:// needs a package: pip install gone_fs"):
        open_fields("jsonl:nowhere://b/a.jsonl", TEXT, "train", tmp_path)


def test_opening_again_reads_no_data_until_the_file_changes(tmp_path, monkeypatch):
    shards(tmp_path, [20, 30])
    first = open_fields(f"jsonl:{tmp_path}/a-*", TEXT, "train", tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(line_files, "_index_lines", lambda *_: pytest.fail("indexed twice"))
        again = open_fields(f"jsonl:{tmp_path}/a-*", TEXT, "train[:10]", tmp_path / "cache")
        assert texts(again) == texts(first)[:10]
    path = tmp_path / "a-00000-of-00002.jsonl"
    stat = path.stat()
    path.write_bytes(lines(20, 70))  # as many bytes
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = open_fields(f"jsonl:{tmp_path}/a-*", TEXT, "train", tmp_path / "cache")
    assert texts(changed)[0] == "größe 70" and changed.content_id != first.content_id


def test_the_state_holds_no_index_and_no_open_file(tmp_path):
    """So that copying a source to a worker costs the same for any number of records."""
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


BAD_LINES = {
    b"nonsense": "not JSON",
    b"": "not JSON",
    b"[" * 100_000: "nested more than",
    b'{"txt": "a"}': "no field 'text' (source.text); did you mean 'txt'",
    b'{"text": 5}': "must be text, not int",
    b'{"text": null}': "must be text, not null",
    b'{"text": ["a"]}': "must be text, not list",
    b'{"text": "\xff"}': "byte 11 is not UTF-8",
    b'{"text": "\\ud800"}': "half of a surrogate pair",
    b"7": "must be a JSON object",
}


@pytest.mark.parametrize("place", [0, 1, 40])
def test_bad_lines_are_problems_and_the_others_are_read(tmp_path, place):
    good = [b'{"text": "%d"}' % i for i in range(50)]
    for bad, what in BAD_LINES.items():
        (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:place], bad, *good[place:]]) + b"\n")
        source = open_fields(f"jsonl:{tmp_path}/a.jsonl", TEXT, "train", tmp_path / "cache")
        found = source.read(range(len(source)))
        problem = found.pop(place)
        assert found == [{"text": str(i)} for i in range(50)]
        assert isinstance(problem, Problem) and problem.where == f"{tmp_path}/a.jsonl line {place + 1}"
        assert what in problem.what and "\n" not in problem.what
        with pytest.raises(UserError, match=f"a.jsonl line {place + 1}: "):
            source[place]


def test_a_wrong_name_is_told_on_opening_though_the_first_records_are_bad(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"nonsense\n" + lines(30))
    with pytest.raises(UserError, match=r"source.text: .*a.jsonl has no field 'txt'; did you mean 'text'"):
        open_fields(f"jsonl:{tmp_path}/a.jsonl", {"text": "txt"}, "train", tmp_path / "cache")


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


def test_columns_of_tables_may_stand_in_another_order_and_must_be_in_every_file(tmp_path):
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


def test_large_and_empty_documents(tmp_path):
    large = "ß" * 5_000_000
    documents = ["", large, "", "a", large]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    assert texts(open_fields(f"jsonl:{tmp_path}/a.jsonl", TEXT, "train", tmp_path / "cache")) == documents
    (tmp_path / "a.txt").write_text("\n\n")
    assert texts(open_fields(f"text:{tmp_path}/a.txt", TEXT, "train", tmp_path / "cache")) == ["", ""]
    for ending in ("", *(f".{ending}" for ending in PACKERS)):
        (tmp_path / f"empty.jsonl{ending}").touch()
        assert len(open_fields(f"jsonl:{tmp_path}/empty.jsonl{ending}", TEXT, "train", tmp_path / "cache")) == 0


def parallel(folder, name="{split}.{field}.gz") -> str:
    for split, count in (("train", 9), ("test", 4)):
        for language, word in (("en", "word"), ("de", "Wört")):
            data = "".join(f"{word} {i}\n" for i in range(count)).encode()
            path = folder / name.format(split=split, field=language)
            path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return f"lines:{folder}/{name}"


@pytest.mark.parametrize("name", ["{split}.{field}.gz", "{field}-{split}.txt"])
def test_parallel_files_give_pairs(tmp_path, name):
    config = SourceConfig(name=parallel(tmp_path, name), inputs="en", targets="de")
    source = open_source(config, "test", tmp_path / "cache")
    assert source.read([3, 0]) == [{"inputs": f"word {i}", "targets": f"Wört {i}"} for i in (3, 0)]
    assert len(source) == 4 and copy.deepcopy(source)[1]["targets"] == "Wört 1"
    part = open_source(config, "train[50%:]", tmp_path / "cache")
    assert part[0]["inputs"] == "word 4" and part.content_id != source.content_id
    turned = open_fields(config.name, {"inputs": "de", "targets": "en"}, "test", tmp_path / "cache")
    assert turned.content_id != source.content_id


def test_mistakes_with_parallel_files_are_named(tmp_path):
    name, pair = parallel(tmp_path), {"inputs": "en", "targets": "de"}
    with pytest.raises(UserError, match="source.targets: .*no field 'dee'; did you mean 'de'"):
        open_fields(name, pair | {"targets": "dee"}, "train", tmp_path / "cache")
    with pytest.raises(UserError, match="must contain {field}"):
        open_fields(f"lines:{tmp_path}/train.en.gz", pair, "train", tmp_path / "cache")
    with pytest.raises(UserError, match="no split 'tst'.*did you mean 'test'"):
        open_fields(name, pair, "tst", tmp_path / "cache")
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(b"one\n\xff\nthree\n"))
    with pytest.raises(UserError, match="field 'de' has 3 lines, but field 'en' has 9"):
        open_fields(name, pair, "train[:1]", tmp_path / "cache")
    (tmp_path / "train.en.gz").write_bytes(gzip.compress(b"1\n2\n3\n"))
    found = open_fields(name, pair, "train", tmp_path / "cache").read([0, 1, 2])
    assert found[0] == {"inputs": "1", "targets": "one"} and found[2] == {"inputs": "3", "targets": "three"}
    assert isinstance(found[1], Problem) and found[1].where.endswith("train.de.gz line 2")


@pytest.mark.parametrize(("split", "other"), [("val", "de"), ("test_2016_flickr", "fr")])
def test_real_parallel_text_is_read_as_gzip_reads_it(tmp_path, split, other):
    folder = SHARED / "mt_multi30k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set TWINSTACK_SHARED_DATA")
    pairs = {"inputs": "en", "targets": other}
    source = open_fields(f"lines:{folder}/{{split}}.{{field}}.gz", pairs, split, tmp_path)
    found = source.read(range(len(source)))
    for ours, theirs in pairs.items():
        with gzip.open(folder / f"{split}.{theirs}.gz", "rt", encoding="utf-8", newline="\n") as file:
            assert [record[ours] for record in found] == [line.removesuffix("\n").removesuffix("\r") for line in file]


def test_many_files_and_a_failure_among_them(tmp_path):
    assert indexes.map_in_threads(lambda n: n * n, range(100), "squares") == [n * n for n in range(100)]
    with pytest.raises(ZeroDivisionError):
        indexes.map_in_threads(lambda n: 1 // (n - 50), range(100), "failing")
    assert indexes.map_in_threads(str, [], "nothing") == []
