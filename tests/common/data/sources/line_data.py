"""Files of lines for the tests of file sources."""

import bz2
import gzip
import json
import lzma

import pyarrow

PACKERS = {
    "gz": gzip.compress,
    "bz2": lambda data: bz2.compress(data, 1),
    "xz": lzma.compress,
    "zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}


TEXT = {"text": "text"}


def lines(count: int, start: int = 0) -> bytes:
    return "".join(json.dumps({"text": f"größe {i}"}) + "\n" for i in range(start, start + count)).encode()


def texts(source) -> list[str]:
    return [record["text"] for record in source.read(range(len(source)))]


def shards(folder, sizes, name="a-{:05}-of-{:05}.jsonl", packer=None) -> list[str]:
    """Writes files with these numbers of lines, and returns all their texts."""
    done = 0
    for number, size in enumerate(sizes):
        data = lines(size, done)
        (folder / name.format(number, len(sizes))).write_bytes(packer(data) if packer else data)
        done += size
    return [f"größe {i}" for i in range(done)]
