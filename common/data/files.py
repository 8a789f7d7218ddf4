"""Local JSONL, TSV and text files as sources: an index of line starts, and reading by seek.

TSV is tab-separated without quoting, its first line names the columns. Text has one record a line, in the field "text".
A path that ends in ".gz" is unpacked into the cache once. Lines count from 1, as editors do.
"""

import dataclasses
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.data.cache import build_once
from common.errors import UserError, nearest

CHUNK_BYTES = 1 << 22
ONLY_SPLIT = "train"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FileSource:
    """One file, or a slice of it; every read opens the file, so that threads and processes may share a source."""

    content_id: str
    scheme: str
    shown: str
    """The path that the user gave, for messages."""
    path: Path
    starts: np.ndarray
    """Byte offset of each line and of the end, int64."""
    first_line: int
    """Line number, from 1, of record 0."""
    columns: tuple[str, ...]
    """A TSV file's header."""
    fields: dict[str, str]
    """Name of a field in our records -> its name in the file's."""

    @classmethod
    def open(cls, scheme: str, pattern: str, split: str, fields: dict[str, str], cache_dir: Path) -> "FileSource":
        """Opens `scheme:pattern`, a path that may hold "{split}". Raises UserError as `open_source` says."""
        base, start, stop = parse_split(split)
        given = _path_of_split(scheme, pattern, base)
        plain = _unpacked(given, cache_dir)
        starts, digest = _index(plain)
        columns: tuple[str, ...] = ()
        first = 1
        if scheme == "tsv":
            columns, first, starts = _header(given, plain, starts), 2, starts[1:]
        low, high = slice_bounds(start, stop, max(len(starts) - 1, 0))
        source = cls(
            content_id=f"{scheme}:{given.name}:{split}:{_reading(fields)}:blake2b-{digest}",
            scheme=scheme,
            shown=str(given),
            path=plain,
            starts=starts[low : high + 1],
            first_line=first + low,
            columns=columns,
            fields=fields,
        )
        known = {"tsv": columns, "text": ("text",)}.get(scheme)
        for ours, theirs in fields.items():
            if known is not None and theirs not in known:
                raise UserError(f"source.{ours}: {given} has no field {theirs!r}; {nearest(theirs, known)}")
        if len(source):
            source[0]  # so that a wrong field or format is told now
        return source

    def __len__(self) -> int:
        return max(len(self.starts) - 1, 0)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.__getitems__([index])[0]

    def read(self, indices):
        return self.__getitems__(indices)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, str]]:
        with open(self.path, "rb") as file:
            return [self._read(file, index) for index in indices]

    def _read(self, file: BinaryIO, index: int) -> dict[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file.seek(self.starts[index])
        line = file.read(self.starts[index + 1] - self.starts[index])
        where = f"{self.shown} line {self.first_line + index}"
        text = _decoded(line, where)
        if self.scheme == "text":
            record = {"text": text}
        elif self.scheme == "tsv":
            record = self._cells(text, where)
        else:
            record = _json(text, where)
        return {ours: _value(record, ours, theirs, where) for ours, theirs in self.fields.items()}

    def _cells(self, text: str, where: str) -> dict[str, str]:
        cells = text.split("\t")
        if len(cells) != len(self.columns):
            raise UserError(f"{where}: {len(cells)} cells, but the header names {len(self.columns)} columns")
        return dict(zip(self.columns, cells, strict=True))


def parse_split(split: str) -> tuple[str, str, str]:
    """A split's name and the bounds of its slice, as written.

    >>> parse_split("train[:95%]"), parse_split("test")
    (('train', '', '95%'), ('test', '', ''))

    Raises UserError for what is neither a name nor a slice of one.
    """
    match = re.fullmatch(r"(\w[\w.-]*)(?:\[(-?\d*%?):(-?\d*%?)\])?", split)
    bounds = match.groups("")[1:] if match else ()
    if not match or any(bound in ("-", "%", "-%") for bound in bounds):
        raise UserError(f"split {split!r} must be a name or a slice of one, for example 'train[:1%]' or 'train[1000:]'")
    return match[1], bounds[0], bounds[1]


def slice_bounds(start: str, stop: str, count: int) -> tuple[int, int]:
    """First record and the one behind the last, by TFDS's rules (percentages round to the closest record).

    >>> slice_bounds("", "1%", 250), slice_bounds("-10", "", 250), slice_bounds("90%", "999", 250)
    ((0, 2), (240, 250), (225, 250))
    """

    def place(bound: str, default: int) -> int:
        if not bound:
            return default
        number = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
        return min(max(number + count if number < 0 else number, 0), count)

    low = place(start, 0)
    return low, max(place(stop, count), low)


def _path_of_split(scheme: str, pattern: str, split: str) -> Path:
    path = Path(pattern.replace("{split}", split)).expanduser()
    if "{split}" not in pattern and split != ONLY_SPLIT:
        raise UserError(
            f"{scheme}:{pattern} is one file, whose only split is {ONLY_SPLIT!r}, not {split!r}; "
            f"slice it (for example {ONLY_SPLIT + '[95%:]'!r}) or put {{split}} into the path"
        )
    if path.is_file():
        return path
    if "{split}" in pattern:
        before, after = pattern.split("{split}", 1)
        folder = Path(before + "x").expanduser().parent
        start = Path(before + "x").name[:-1]
        there = [found.name for found in folder.glob(f"{start}*{after}")] if "/" not in after else []
        splits = [name[len(start) : len(name) - len(after)] for name in there]
        raise UserError(f"{scheme}:{pattern} has no split {split!r} (no file {path}); {nearest(split, splits)}")
    beside = [found.name for found in path.parent.iterdir() if found.is_file()] if path.parent.is_dir() else []
    close = nearest(path.name, beside).partition("?")
    raise UserError(f"{scheme}:{pattern}: no such file" + (f"; {close[0]}?" if close[1] else ""))


def _unpacked(path: Path, cache_dir: Path) -> Path:
    if path.suffix != ".gz":
        return path
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()

    def unpack(part: Path) -> None:
        try:
            with gzip.open(path, "rb") as packed, open(part, "wb") as out:
                shutil.copyfileobj(packed, out, CHUNK_BYTES)
        except (OSError, EOFError) as error:
            raise UserError(f"{path} is not a whole gzip file: {error}") from error

    return build_once(cache_dir / "unpacked" / digest, unpack)


def _index(path: Path) -> tuple[np.ndarray, str]:
    """Where lines start, and behind the last byte; and a hash of all bytes."""
    digest, size, ends = hashlib.blake2b(digest_size=16), 0, []
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            ends.append(size + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
            size += len(chunk)
        file.seek(0)
        first = len(BYTE_ORDER_MARK) if file.read(3) == BYTE_ORDER_MARK else 0
    starts = np.concatenate([np.array([first], np.int64), *ends])
    if starts[-1] != size and size > first:
        starts = np.append(starts, size)  # the last line has no newline
    return starts, digest.hexdigest()


def _header(given: Path, plain: Path, starts: np.ndarray) -> tuple[str, ...]:
    if len(starts) < 2:
        raise UserError(f"{given} is empty; the first line of a TSV file names its columns")
    with open(plain, "rb") as file:
        file.seek(starts[0])
        columns = tuple(_decoded(file.read(starts[1] - starts[0]), f"{given} line 1").split("\t"))
    if len(set(columns)) != len(columns):
        raise UserError(f"{given} line 1: two columns have one name")
    return columns


def _decoded(line: bytes, where: str) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8") from error
    return text.removesuffix("\n").removesuffix("\r")


def _json(text: str, where: str) -> dict:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON object is wanted, not a {type(record).__name__}")
    return record


def _value(record: dict, ours: str, theirs: str, where: str) -> str:
    if theirs not in record:
        raise UserError(f"{where}: no field {theirs!r} (source.{ours}); {nearest(theirs, record)}")
    value = record[theirs]
    if ours not in ("inputs", "targets", "text") and isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {theirs!r} (source.{ours}) must be text, not {type(value).__name__}")
    return value


def _reading(fields: dict[str, str]) -> str:
    return ",".join(f"{ours}={theirs}" for ours, theirs in fields.items() if ours != "group")
