"""JSONL, TSV and text files, a record a line: an index of line starts, and reading by seek.

TSV is tab-separated without quoting; its first line names the columns, or else they are named by number, from 1. Text
has one record a line, in the field "text". Lines count from 1, as editors do.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.sources.indexes import Index, IndexResult, open_index, write_integers
from common.data.sources.packed_files import PlainFile
from common.data.sources.records import Problem, UnusableRecord, too_long_reason
from common.errors import UserError
from common.json_text import parse_json

CHUNK_BYTES = 1 << 22
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TEXT_COLUMNS = ("text",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineFile:
    """One file; every read opens it, so that threads and processes may share it."""

    kind: str
    """jsonl, tsv or text."""
    shown: str
    path: Path
    index: Index
    columns: tuple[str, ...] | None
    """The names of all fields; None where every record has its own."""
    header: bool = False
    """Whether the first line is none of the records, but names the columns."""

    def __len__(self) -> int:
        return max(self.index.records - self._header_lines, 0)

    @property
    def _header_lines(self) -> int:
        return 1 if self.header else 0

    def read(self, places: Sequence[int]) -> list[dict[str, Any] | Problem]:
        """Records by their number in this file, as the file names their fields."""
        starts = self.index.starts
        found: list[dict[str, Any] | Problem] = []
        with open(self.path, "rb") as file:
            for low, high in consecutive_runs(places):
                bounds = starts[low + self._header_lines : high + 1 + self._header_lines].tolist()
                file.seek(bounds[0])
                for place, (begin, end) in enumerate(itertools.pairwise(bounds), low):
                    if what := too_long_reason(end - begin):
                        found.append(Problem(where=self.where(place), what=what))
                        file.seek(end)
                    else:
                        found.append(self._record(file.read(end - begin), place))
        return found

    def where(self, place: int) -> str:
        return f"{self.shown} line {place + self._header_lines + 1}"

    def _record(self, line: bytes, place: int) -> dict[str, Any] | Problem:
        number = place + self._header_lines
        try:
            if self.index.torn and number == self.index.records - 1:
                raise UnusableRecord(self.index.torn)
            return self._parse(_decode_line(line))
        except UnusableRecord as error:
            return Problem(where=self.where(place), what=str(error))

    def _parse(self, text: str) -> dict[str, Any]:
        if self.kind == "text":
            return {"text": text}
        if self.kind == "jsonl":
            return _parse_json_object(text)
        cells = text.split("\t")
        assert self.columns is not None
        if len(cells) != len(self.columns):
            says = "the header names" if self.header else "the first line has"
            raise UnusableRecord(f"{len(cells)} cells, but {says} {len(self.columns)} columns")
        return dict(zip(self.columns, cells, strict=True))


def open_line_file(kind: str, file: PlainFile, cache_dir: Path, header: bool) -> LineFile:
    """`header` counts for TSV. Raises UserError where the header of a TSV file cannot be used."""
    index = open_index("lines", file, cache_dir, _index_lines)
    columns: tuple[str, ...] | None = TEXT_COLUMNS if kind == "text" else None
    if kind == "tsv":
        columns = _header_columns(file, index) if header else _numbered_columns(file, index)
    header = header and kind == "tsv"
    return LineFile(kind=kind, shown=file.shown, path=file.path, index=index, columns=columns, header=header)


def consecutive_runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Stretches of neighbours: (first, behind the last).

    >>> list(consecutive_runs([4, 5, 6, 6, 1]))
    [(4, 7), (6, 7), (1, 2)]
    """
    low = 0
    for at in range(1, len(places) + 1):
        if at == len(places) or places[at] != places[at - 1] + 1:
            yield places[low], places[at - 1] + 1
            low = at


def _index_lines(file: PlainFile, starts: Path) -> IndexResult:
    """Where lines start, and behind the last byte; and a hash of all bytes."""
    digest = hashlib.blake2b(file.torn.encode(), digest_size=16)
    records = write_integers(starts, _line_starts(file, digest)) - 1
    return IndexResult(records=records, digest=digest.hexdigest(), torn=file.torn)


def _line_starts(file: PlainFile, digest: hashlib.blake2b) -> Iterator[np.ndarray]:
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
    if last != size or file.torn:  # the last line has no newline, or stands for what is lost
        yield np.array([size], np.int64)


def _header_columns(file: PlainFile, index: Index) -> tuple[str, ...]:
    if index.records < 1:
        raise UserError(f"{file.shown} is empty; the first line of a TSV file names its columns")
    if index.torn and index.records == 1:
        raise UserError(f"{file.shown} line 1: {index.torn}; the first line of a TSV file names its columns")
    try:
        return tuple(_decode_line(_first_line(file, index)).split("\t"))
    except UnusableRecord as error:
        raise UserError(f"{file.shown} line 1: {error}") from error


def _numbered_columns(file: PlainFile, index: Index) -> tuple[str, ...] | None:
    """Column names 1, 2, ..., one for each cell of the first line; None where there is no line."""
    if index.records - bool(index.torn) < 1:
        return None
    return tuple(str(number + 1) for number in range(_first_line(file, index).count(b"\t") + 1))


def _first_line(file: PlainFile, index: Index) -> bytes:
    low, high = index.starts[:2].tolist()
    if what := too_long_reason(high - low):
        raise UserError(f"{file.shown} line 1: {what}")
    with open(file.path, "rb") as opened:
        opened.seek(low)
        return opened.read(high - low)


def _decode_line(line: bytes) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableRecord(f"byte {error.start + 1} is not UTF-8") from error
    return text.removesuffix("\n").removesuffix("\r")


def _parse_json_object(text: str) -> dict[str, Any]:
    try:
        record = parse_json(text, finite=False)  # a field that is not read may hold anything
    except json.JSONDecodeError as error:
        raise UnusableRecord(f"not JSON ({error})") from error
    except ValueError as error:
        raise UnusableRecord(str(error)) from error
    if not isinstance(record, dict):
        raise UnusableRecord(f"a JSON object is wanted, not a {type(record).__name__}")
    return record
