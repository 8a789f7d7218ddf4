"""Random access to Parquet files: decodes a row group at a time, and only the requested columns."""

import dataclasses
import functools
import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data.sources.indexes import Index, IndexResult, file_digest, open_index, write_integers
from common.data.sources.packed_files import PlainFile
from common.data.sources.records import Problem, first_line
from common.errors import UserError

FILES_OPEN = 64
GROUPS_IN_MEMORY = 4
"""Decoded row groups that a process keeps. Sequential reads need one; random reads decode a group for most rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParquetFile:
    """One file. Handles and decoded row groups belong to the process, so the object can be pickled and shared."""

    shown: str
    path: Path
    index: Index
    """Its `starts` are the numbers of the row groups' first rows, then the count of all rows."""
    wanted: tuple[str, ...]
    """The columns to read."""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.index.columns

    def __len__(self) -> int:
        return self.index.records

    def where(self, position: int) -> str:
        return f"{self.shown} row {position}"

    def read(self, positions: Sequence[int]) -> list[dict[str, Any] | Problem]:
        starts = self.index.starts
        groups = (np.searchsorted(starts, positions, side="right") - 1).tolist()
        found: list[dict[str, Any] | Problem] = []
        for group, members in itertools.groupby(zip(groups, positions, strict=True), key=lambda pair: pair[0]):
            in_group = [position for _, position in members]
            try:
                table = _row_group(_FileVersion(self.path, self.index.folder, os.getpid()), group, self.wanted)
            except (OSError, ValueError, NotImplementedError) as error:  # pyarrow raises all three for damage
                if isinstance(error, OSError) and error.errno:  # the disk or network failed, the file is not damaged
                    raise
                what = f"its row group cannot be read ({first_line(error)})"
                found += [Problem(where=self.where(position), what=what) for position in in_group]
            else:
                found += [self._record(table, position, int(starts[group])) for position in in_group]
        return found

    def _record(self, table: Any, position: int, first: int) -> dict[str, Any] | Problem:
        """Returns a record from its decoded row group, whose first row is at `first`."""
        try:
            return {name: _json_value(table[name][position - first].as_py()) for name in self.wanted}
        except UnicodeDecodeError as error:
            return Problem(where=self.where(position), what=f"byte {error.start + 1} of a field is not UTF-8")
        except ValueError as error:  # two fields of a struct with one name
            return Problem(where=self.where(position), what=first_line(error))


def open_parquet(file: PlainFile, fields: Mapping[str, str], cache_dir: Path) -> ParquetFile:
    """Opens a Parquet file to read `fields` (our names -> columns). Raises UserError if the file is not whole."""
    index = open_index("parquet", file, cache_dir, _index_parquet)
    asked = {name for theirs in fields.values() for name in (theirs, theirs.split(".")[0])}
    wanted = tuple(name for name in dict.fromkeys(index.columns) if name in asked)
    return ParquetFile(shown=file.shown, path=file.path, index=index, wanted=wanted)


def _json_value(value: Any) -> Any:
    """Returns a value with maps as dicts, at every depth; pyarrow returns them as lists of pairs."""
    if isinstance(value, dict):
        return {name: _json_value(inner) for name, inner in value.items()}
    if isinstance(value, list):
        pairs = bool(value) and isinstance(value[0], tuple)
        return {name: _json_value(inner) for name, inner in value} if pairs else [_json_value(inner) for inner in value]
    return value


def _index_parquet(file: PlainFile, starts: Path) -> IndexResult:
    """Writes the number of each row group's first row, then the count of all rows, to `starts`."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as opened:
            about, names = opened.metadata, tuple(opened.schema_arrow.names)
    except (OSError, ValueError) as error:
        raise UserError(f"{file.shown} is not a whole Parquet file: {first_line(error)}") from error
    rows = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
    write_integers(starts, [np.cumsum([0, *rows])])
    return IndexResult(records=about.num_rows, digest=file_digest(file.path), columns=names)


class _FileVersion(NamedTuple):
    """The cache key of a reader: a changed file has another `content`, a forked process another `process`."""

    path: Path
    content: Path
    process: int


@functools.lru_cache(FILES_OPEN)
def _cached_reader(version: _FileVersion) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(version.path)


@functools.lru_cache(GROUPS_IN_MEMORY)
def _cached_row_group(version: _FileVersion, group: int, columns: tuple[str, ...]) -> Any:
    return _cached_reader(version).read_row_group(group, columns=list(columns))


def _row_group(version: _FileVersion, group: int, columns: tuple[str, ...]) -> Any:
    """Returns a row group. One thread decodes it while the others wait, so that it is in memory once."""
    with _decoding_lock(version.process):
        return _cached_row_group(version, group, columns)


@functools.lru_cache
def _decoding_lock(process: int) -> threading.Lock:
    """Returns the process's lock; a forked process gets a new one, since its parent's may be held."""
    return threading.Lock()
