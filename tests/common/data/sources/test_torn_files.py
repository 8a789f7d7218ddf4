"""Packed files that are torn or damaged, and lines that cannot be used: each is reported, and all others are read."""

import bz2
import contextlib
import errno
import gzip
import json
import lzma
import random
import zlib

import pyarrow
import pytest

from common.data.sources import line_files, packed_files
from common.data.sources.by_name import open_fields
from common.data.sources.records import Problem
from common.errors import UserError
from tests.common.data.sources.line_data import PACKERS, TEXT, lines, shards, texts


def prefix(packed: bytes, ending: str) -> bytes:
    """The data left in a truncated file, decompressed independently of our code."""
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
def test_all_whole_lines_of_a_torn_file_are_read_and_the_tear_is_a_problem(tmp_path, ending, share):
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
def test_a_file_that_is_not_packed_is_an_error(tmp_path, ending):
    (tmp_path / f"a.jsonl.{ending}").write_bytes(lines(300))
    with pytest.raises(UserError, match=f"a.jsonl.{ending} is damaged, or not packed as its name says"):
        open_fields(f"jsonl:{tmp_path}/a.jsonl.{ending}", TEXT, "train", tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache" / "unpacked").iterdir() if not p.name.startswith(".")]


def test_a_full_disk_is_not_taken_for_a_tear(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(300)))

    def full(path):
        yield lines(2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setitem(packed_files.UNPACKERS, ".gz", full)
        with pytest.raises(UserError, match="a.jsonl.gz cannot be unpacked into .*No space left"):
            open_fields(f"jsonl:{tmp_path}/a.jsonl.gz", TEXT, "train", tmp_path / "cache")
    assert len(open_fields(f"jsonl:{tmp_path}/a.jsonl.gz", TEXT, "train", tmp_path / "cache")) == 300


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


def test_a_wrong_field_is_an_error_on_opening_even_if_the_first_record_is_bad(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"nonsense\n" + lines(30))
    with pytest.raises(UserError, match=r"source.text: .*a.jsonl has no field 'txt'; did you mean 'text'"):
        open_fields(f"jsonl:{tmp_path}/a.jsonl", {"text": "txt"}, "train", tmp_path / "cache")


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
