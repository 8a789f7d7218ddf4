"""Random access to TFRecord and ArrayRecord files of serialized tf.Example protos, without TensorFlow.

A TFRecord file is a sequence of records: length (uint64), masked CRC-32C of the length (uint32), data, masked CRC-32C
of the data (uint32), all little-endian. Messages number records from 0.
"""

import array
import dataclasses
import functools
import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from common.data.sources.indexes import Index, IndexResult, file_digest, open_index, write_integers
from common.data.sources.packed_files import PlainFile
from common.data.sources.record_spans import read_spans
from common.data.sources.records import FeatureValues, Problem, first_line
from common.errors import UserError

LENGTH_BYTES, HEAD_BYTES, TAIL_BYTES = 8, 12, 4
MASK_DELTA = 0xA282EAD8
WRONG_LENGTH = "its length does not match its checksum, so that it and all behind it in the file cannot be found"
"""Part of a damaged file's content id (see `Index.digest`), so its words must stay as they are."""
READERS_OPEN = 256
BUFFER_BYTES = 1 << 15
"""Buffer of an ArrayRecord reader; small, since most reads are at random positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfRecordFile:
    """One file. Every read opens it, so threads and processes can share the object."""

    shown: str
    path: Path
    index: Index
    """Its `starts` are the byte offsets of the whole records, and the end of the last one."""
    columns: None = None

    def __len__(self) -> int:
        return self.index.records

    def where(self, position: int) -> str:
        return f"{self.shown} record {position}"

    def read(self, positions: Sequence[int]) -> list[dict[str, Any] | Problem]:
        spans = read_spans(self.path, self.index.starts, positions, self.index.torn)
        return [self._record(framed, position) for position, framed in spans]

    def _record(self, framed: bytes | str, position: int) -> dict[str, Any] | Problem:
        """Checks and parses a record; text instead of bytes is the reason that it was not read."""
        if isinstance(framed, str):
            return Problem(where=self.where(position), what=framed)
        data = framed[HEAD_BYTES:-TAIL_BYTES]
        if masked_crc32c(data) != int.from_bytes(framed[-TAIL_BYTES:], "little"):
            return Problem(where=self.where(position), what="its bytes do not match their checksum")
        return _parse_example(data, self.where(position))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecordFile:
    """One file. Readers belong to the process, so the object can be pickled and shared."""

    shown: str
    path: Path
    index: Index
    columns: None = None

    def __len__(self) -> int:
        return self.index.records

    def where(self, position: int) -> str:
        return f"{self.shown} record {position}"

    def read(self, positions: Sequence[int]) -> list[dict[str, Any] | Problem]:
        reader = _cached_array_reader(self.path, self.index.folder, os.getpid())
        try:
            found = reader.read(list(positions))
        except RuntimeError as error:  # one of several records may be damaged: read them one by one
            if len(positions) == 1:
                return [Problem(where=self.where(positions[0]), what=first_line(error))]
            return [record for position in positions for record in self.read([position])]
        return [_parse_example(data, self.where(position)) for data, position in zip(found, positions, strict=True)]


def open_tf_record(file: PlainFile, cache_dir: Path) -> TfRecordFile:
    """Opens a TFRecord file, indexing it first if necessary."""
    index = open_index("tfrecord", file, cache_dir, _index_tf_record)
    return TfRecordFile(shown=file.shown, path=file.path, index=index)


def open_array_record(file: PlainFile, cache_dir: Path) -> ArrayRecordFile:
    """Opens an ArrayRecord file, indexing it first if necessary. Raises UserError if `file` is not a whole one."""
    index = open_index("arrayrecord", file, cache_dir, _index_array_record)
    return ArrayRecordFile(shown=file.shown, path=file.path, index=index)


def masked_crc32c(data: bytes) -> int:
    """Returns the CRC-32C of `data`, masked as TFRecord files store it.

    >>> hex(masked_crc32c(b"123456789"))
    '0xc78ab0e5'
    """
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF


def _index_tf_record(file: PlainFile, starts: Path) -> IndexResult:
    """Writes the start of every whole record, and the end of the last, to `starts`."""
    positions, torn, wrong = array.array("q", [0]), file.torn, False
    if size := file.path.stat().st_size:
        with open(file.path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            while positions[-1] + HEAD_BYTES <= size:
                head = data[positions[-1] : positions[-1] + HEAD_BYTES]
                length, checksum = struct.unpack("<QI", head)
                if wrong := masked_crc32c(head[:LENGTH_BYTES]) != checksum:
                    break
                end = positions[-1] + HEAD_BYTES + length + TAIL_BYTES
                if end > size:
                    break
                positions.append(end)
    if wrong:
        torn = WRONG_LENGTH
    elif positions[-1] != size:
        torn = torn or "the file ends in the middle of it"
    write_integers(starts, [np.frombuffer(positions, np.int64)])
    return IndexResult(records=len(positions) - 1 + bool(torn), digest=file_digest(file.path, torn), torn=torn)


def _index_array_record(file: PlainFile, starts: Path) -> IndexResult:
    reader = _open_array_reader(file.path)
    if not reader.ok():
        raise UserError(f"{file.shown} is not a whole ArrayRecord file; a copy may have been cut short")
    return IndexResult(records=reader.num_records(), digest=file_digest(file.path))


@functools.lru_cache(READERS_OPEN)
def _cached_array_reader(path: Path, version: Path, process: int) -> Any:
    """Returns this process's reader, whose threads would not survive a fork; a changed file has another `version`."""
    return _open_array_reader(path)


def _open_array_reader(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), "readahead_buffer_size:0", file_reader_buffer_size=BUFFER_BYTES)


@functools.cache
def _example_class() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def _parse_example(data: bytes, where: str) -> dict[str, Any] | Problem:
    """Returns the features of a serialized tf.Example by name.

    TFDS names nested features "answers/text"; these also become nested dicts, so that "answers.text" finds them.
    """
    from google.protobuf.message import DecodeError

    try:
        example = _example_class().FromString(data)
    except DecodeError as error:
        return Problem(where=where, what=f"not a tf.Example ({error})")
    found = {name: _feature_values(feature) for name, feature in example.features.feature.items()}
    for name in [name for name in found if "/" in name]:
        *outer, last = name.split("/")
        inside: Any = found
        for part in outer:
            inside = inside.setdefault(part, {}) if isinstance(inside, dict) else None
        if isinstance(inside, dict):
            inside.setdefault(last, found[name])
    return found


def _feature_values(feature: Any) -> FeatureValues:
    kind = feature.WhichOneof("kind")
    return FeatureValues(getattr(feature, kind).value if kind else [])
