"""Random access to JSONL, TSV and text files, one record per line, through an index of line starts.

TSV is tab-separated without quoting. Its first line names the columns; without a header they are numbered from 1. A
text record has one field, "text". Messages number lines from 1, as editors do.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.sources.indexes import Index, IndexResult, open_index, write_integers
from common.data.sources.packed_files import PlainFile
from common.data.sources.record_spans import read_spans
from common.data.sources.records import Problem, UnusableRecord, too_long_reason
from common.errors import UserError
from common.json_text import parse_json

CHUNK_BYTES = 1 << 22
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TEXT_COLUMNS = ("text",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineFile:
    """One file. Every read opens it, so threads and processes can share the object."""

    kind: str
    """"jsonl", "tsv" or "text"."""
    shown: str
    path: Path
    index: Index
    columns: tuple[str, ...] | None
    """The field names of all records; None if every record has its own."""
    header: bool = False
    """Whether the first line names the columns and is no record."""

    def __len__(self) -> int:
        return max(self.index.records - self._header_lines, 0)

    @property
    def _header_lines(self) -> int:
        return 1 if self.header else 0

    def read(self, positions: Sequence[int]) -> list[dict[str, Any] | Problem]:
        """Returns the records with these numbers, their fields named as in the file."""
        spans = read_spans(self.path, self.index.starts[self._header_lines :], positions)
        return [self._record(line, position) for position, line in spans]

    def where(self, position: int) -> str:
        return f"{self.shown} line {position + self._header_lines + 1}"

    def _record(self, line: bytes | str, position: int) -> dict[str, Any] | Problem:
        """Parses a line; text instead of bytes is the reason that it was not read."""
        number = position + self._header_lines
        try:
            if isinstance(line, str):
                raise UnusableRecord(line)
            if self.index.torn and number == self.index.records - 1:
                raise UnusableRecord(self.index.torn)
            return self._parse(_decode_line(line))
        except UnusableRecord as error:
            return Problem(where=self.where(position), what=str(error))

    def _parse(self, text: str) -> dict[str, Any]:
        if self.kind == "text":
            return {"text": text}
        if self.kind == "jsonl":
            return _parse_json_object(text)
        cells = text.split("\t")
        assert self.columns is not None
        if len(cells) != len(self.columns):
            first_line = "the header names" if self.header else "the first line has"
            raise UnusableRecord(f"{len(cells)} cells, but {first_line} {len(self.columns)} columns")
        return dict(zip(self.columns, cells, strict=True))


def open_line_file(kind: str, file: PlainFile, cache_dir: Path, header: bool) -> LineFile:
    """Opens a file of `kind` "jsonl", "tsv" or "text", indexing it first if necessary.

    `header` matters only for TSV. Raises UserError if the header of a TSV file cannot be used.
    """
    index = open_index("lines", file, cache_dir, _index_lines)
    columns: tuple[str, ...] | None = TEXT_COLUMNS if kind == "text" else None
    if kind == "tsv":
        columns = _header_columns(file, index) if header else _numbered_columns(file, index)
    header = header and kind == "tsv"
    return LineFile(kind=kind, shown=file.shown, path=file.path, index=index, columns=columns, header=header)


def _index_lines(file: PlainFile, starts: Path) -> IndexResult:
    """Writes the start of every line, and the end of the last, to `starts`; hashes all bytes on the way."""
    digest = hashlib.blake2b(file.torn.encode(), digest_size=16)
    records = write_integers(starts, _line_starts(file, digest)) - 1
    return IndexResult(records=records, digest=digest.hexdigest(), torn=file.torn)


def _line_starts(file: PlainFile, digest: hashlib.blake2b) -> Iterator[np.ndarray]:
    """Yields int64 line starts, then the end of the last line, while updating `digest` with all bytes."""
    with open(file.path, "rb") as opened:
        size = last = len(BYTE_ORDER_MARK) if opened.read(3) == BYTE_ORDER_MARK else 0
        digest.update(BYTE_ORDER_MARK[:size])
        opened.seek(size)
        yield np.array([size], np.int64)
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
            ends = size + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
            last, size = (int(ends[-1]) if len(ends) else last), size + len(chunk)
            yield ends
    if last != size or file.torn:  # the last line has no newline, or stands for the lost records
        yield np.array([size], np.int64)


def _header_columns(file: PlainFile, index: Index) -> tuple[str, ...]:
    """Returns the column names in the first line. Raises UserError if there is no readable first line."""
    if index.records < 1:
        raise UserError(f"{file.shown} is empty; the first line of a TSV file names its columns")
    if index.torn and index.records == 1:
        raise UserError(f"{file.shown} line 1: {index.torn}; the first line of a TSV file names its columns")
    try:
        return tuple(_decode_line(_first_line(file, index)).split("\t"))
    except UnusableRecord as error:
        raise UserError(f"{file.shown} line 1: {error}") from error


def _numbered_columns(file: PlainFile, index: Index) -> tuple[str, ...] | None:
    """Returns column names "1", "2", ..., one for each cell of the first line; None if the file has no line."""
    if index.records - bool(index.torn) < 1:
        return None
    return tuple(str(number + 1) for number in range(_first_line(file, index).count(b"\t") + 1))


def _first_line(file: PlainFile, index: Index) -> bytes:
    low, high = index.starts[:2].tolist()
    if reason := too_long_reason(high - low):
        raise UserError(f"{file.shown} line 1: {reason}")
    with open(file.path, "rb") as opened:
        opened.seek(low)
        return opened.read(high - low)


def _decode_line(line: bytes) -> str:
    """Returns the text of a line without its newline."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableRecord(f"byte {error.start + 1} is not UTF-8") from error
    return text.removesuffix("\n").removesuffix("\r")


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        record = parse_json(text, finite=False)  # fields that nobody reads may hold NaN
    except json.JSONDecodeError as error:
        raise UnusableRecord(f"not JSON ({error})") from error
    except ValueError as error:
        raise UnusableRecord(str(error)) from error
    if not isinstance(record, dict):
        raise UnusableRecord(f"must be a JSON object, not a {type(record).__name__}")
    return record
