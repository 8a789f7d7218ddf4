"""Packed files: a valid one is read to its end, and part of a damaged one is never taken for the whole."""

import bz2
import gzip
import itertools
import json
import lzma
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import pyarrow
import pytest

from common.data.corpora.by_name import open_corpus
from common.data.sources import packed_files, records
from common.data.sources.by_name import open_fields
from common.data.sources.files import find_files
from common.data.sources.packed_files import UNPACKERS, PlainFile, plain_file
from common.data.sources.records import in_batches
from common.errors import UserError
from tests.common.data.memory_source import MemorySource
from tests.common.data.sources.test_example_files import example, write_tf_record

PARTS = [random.Random(seed).randbytes(150).hex().encode() + b"\n" for seed in range(3)]
WHOLE = b"".join(PARTS)


def zstd(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
PADDED = ["gz", "xz"]


def unpacked(path: Path, packed: bytes, cache: Path) -> tuple[bytes, str]:
    """The readable part of a packed file, and why the rest cannot be read."""
    path.write_bytes(packed)
    (found,) = find_files("text", str(path), "train")
    plain: PlainFile = plain_file(found, cache)
    return plain.path.read_bytes(), plain.torn


@pytest.mark.parametrize("ending", PACKERS)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_all_streams_of_a_file_are_read(tmp_path, monkeypatch, ending, chunk):
    monkeypatch.setattr(packed_files, "CHUNK_BYTES", chunk)
    streams = [PACKERS[ending](part) for part in PARTS]
    assert unpacked(tmp_path / f"a.{ending}", b"".join(streams), tmp_path / "a") == (WHOLE, "")
    if ending in PADDED:
        for number, zeros in enumerate((bytes(4), bytes(8), bytes(4096))):
            padded = zeros.join([*streams, b""])
            assert unpacked(tmp_path / f"{number}.{ending}", padded, tmp_path / "padded") == (WHOLE, "")


# pyarrow writes no checksum into zstd, so changed bytes are valid data there.
@pytest.mark.parametrize(
    ("kind", "ending"), [("cut", "zst"), *itertools.product(["cut", "flipped", "zeroed"], ["gz", "bz2", "xz"])]
)
def test_a_damaged_file_is_never_taken_for_a_whole_one(tmp_path, kind, ending):
    streams = [PACKERS[ending](part) for part in PARTS]
    packed, borders = b"".join(streams), {len(streams[0]), len(streams[0] + streams[1])}
    draw, named = random.Random(0), 0
    later = range(len(streams[0]) - 30, len(packed), 11)  # a later stream
    places = sorted({*range(1, 30), *borders, *(border + 1 for border in borders), *later})
    for place in places:
        damaged = bytearray(packed[:place] if kind == "cut" else packed)
        if kind == "flipped":
            damaged[place] ^= 1 << draw.randrange(8)
        elif kind == "zeroed":
            damaged[place : place + 6] = bytes(len(damaged[place : place + 6]))
        try:
            data, torn = unpacked(tmp_path / f"{place}.{ending}", bytes(damaged), tmp_path / "cache")
        except UserError as error:
            named += f"{place}.{ending} is damaged, or not packed as its name says" in str(error)
            continue
        assert torn or data == WHOLE or (kind == "cut" and place in borders)
        assert torn or data.startswith(PARTS[0])
        named += bool(torn)
    assert named > 0.8 * len(places)


def test_a_window_over_the_memory_limit_is_an_error(tmp_path):
    long = struct.pack("<IBB", 0xFD2FB528, 0, 18 << 3) + (len(WHOLE) << 3 | 1).to_bytes(3, "little") + WHOLE
    with pytest.raises(UserError, match="a.zst: its window is longer than 128 MiB, .* zstd without --long"):
        unpacked(tmp_path / "a.zst", long, tmp_path / "cache")
    with pytest.raises(UserError, match="b.zst: its window is longer than 128 MiB"):  # in a later frame too
        unpacked(tmp_path / "b.zst", zstd(WHOLE) + long, tmp_path / "cache")
    header = bytearray(lzma.compress(WHOLE, preset=0))
    place = header.index(b"\x21\x01", 12) + 2  # LZMA2's properties: the size of the dictionary
    header[place] = 38  # 2 GiB
    end = 12 + (header[12] + 1) * 4 - 4
    header[end : end + 4] = struct.pack("<I", zlib.crc32(header[12:end]))
    with pytest.raises(UserError, match="c.xz: unpacking takes more than 256 MiB of memory"):
        unpacked(tmp_path / "c.xz", bytes(header), tmp_path / "cache")


def test_memory_does_not_grow_with_the_unpacked_size(tmp_path):
    line = json.dumps({"text": "a" * (1 << 18)}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 400, 1))
    tracemalloc.start()
    try:
        source = open_fields(f"jsonl:{tmp_path}/a.jsonl.gz", {"text": "text"}, "train", tmp_path / "cache")
        count = sum(len(batch) for batch in in_batches(source, range(len(source)), 512))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 400 and peak < 0.5 * 400 * len(line)


def test_a_record_over_the_limit_is_a_problem_and_the_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RECORD_BYTES", 1 << 20)
    texts = ["a", "b" * (1 << 20), "c"]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    write_tf_record(tmp_path / "a.tfrecord", [example(text=text) for text in texts])
    for name, where in (("text:{}/a.txt", "line 2"), ("tfrecord:{}/a.tfrecord", "record 1")):
        source = open_fields(name.format(tmp_path), {"text": "text"}, "train", tmp_path / "cache")
        first, long, last = source.read(range(3))
        assert (first, last) == ({"text": "a"}, {"text": "c"}) and long.where.endswith(where)
        assert "but the limit is 1 MiB" in long.what


def test_batches_contain_every_record_once_in_order():
    texts = ["x" * (1 << 21 if 100 < i < 120 else i) for i in range(300)]
    batches = list(in_batches(MemorySource([{"text": text} for text in texts]), range(300), 128))
    assert [record["text"] for batch in batches for record in batch] == texts
    assert max(map(len, batches)) <= 128 and max(sum(len(r["text"]) for r in batch) for batch in batches[2:]) < 1 << 24


def test_a_corpus_is_read_to_its_end_or_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINSTACK_SHARED_DATA", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    path = tmp_path / "tasks" / "sst2.test.tsv.xz"
    streams = [lzma.compress(b"good\t1\n"), lzma.compress(b"bad\t0\n")]
    path.write_bytes(bytes(4).join(streams))
    assert len(open_corpus("sst2", "test", {"text": "sentence"})) == 2
    path.write_bytes(streams[0] + b"x" + streams[1][1:])
    with pytest.raises(UserError, match="sst2.test.tsv.xz cannot be unpacked"):
        open_corpus("sst2", "test", {"text": "sentence"})


def test_these_tests_cover_every_suffix():
    assert {f".{ending}" for ending in PACKERS} == set(UNPACKERS)
