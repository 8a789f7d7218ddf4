"""Sources made of files: numbers records across files, slices them, and picks the requested fields.

A source's index i is record `low + i` of all its files end to end, which is at some position in one file.

Legend: R records of one read.
"""

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.data.sources.columnar import open_parquet
from common.data.sources.files import FoundFile, find_files, parse_split, placeholder_values, slice_bounds
from common.data.sources.indexes import Index, map_in_threads
from common.data.sources.line_files import open_line_file
from common.data.sources.packed_files import PlainFile, plain_file
from common.data.sources.records import (
    NUMBER_TEXT_VERSION,
    TEXT_FIELDS,
    Problem,
    Record,
    SourceBase,
    UnusableRecord,
    check_range,
    field_paths,
    is_list,
    pick_fields,
)
from common.data.sources.tf_records import open_array_record, open_tf_record
from common.errors import UserError, nearest

RECORDS_CHECKED = 16
"""How many records are read on opening, to check that the requested fields exist."""
HEADER_HINT = "; the first line names the columns; if it does not, give their numbers (inputs=1 targets=2)"
FOLDER_NAME_PARTS = {
    "parquet": (".parquet",),
    "tfrecord": ("tfrecord",),
    "arrayrecord": ("array_record", "arrayrecord"),
}
"""Formats that can be read by folder -> what the names of the folder's data files contain."""


class DataFile(Protocol):
    """One file of some format, whose records are read as stored."""

    @property
    def shown(self) -> str:
        """Its path or url, for messages."""
        ...

    @property
    def index(self) -> Index: ...

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The field names of all records; None if every record has its own."""
        ...

    def __len__(self) -> int: ...

    def read(self, positions: Sequence[int]) -> list[dict[str, Any] | Problem]:
        """Returns the records at these positions in the file."""
        ...

    def where(self, position: int) -> str:
        """Returns where to look for a record, for messages."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FileSource(SourceBase):
    """The records of several files, one file after another, or a slice of them."""

    content_id: str
    files: tuple[DataFile, ...]
    ends: tuple[int, ...]
    """Running totals: the number of records up to the end of each file."""
    low: int
    """First record of the slice."""
    high: int
    """End of the slice."""
    fields: Mapping[str, str]
    """Our name of a field -> its name in the files."""

    def __len__(self) -> int:
        return self.high - self.low

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        return [
            raw if isinstance(raw, Problem) else self._pick(raw, index)
            for index, raw in zip(indices, self.raw(indices), strict=True)
        ]

    def raw(self, indices: Sequence[int]) -> list[dict[str, Any] | Problem]:
        """Returns records as stored, in the order of `indices`; each file is read once, in ascending order."""
        check_range(indices, len(self))
        found: list[Any] = [None] * len(indices)
        record_R = np.asarray(indices, np.int64) + self.low
        file_R = np.searchsorted(self.ends, record_R, side="right")
        order_R = np.lexsort((record_R, file_R))
        for group in np.split(order_R, np.flatnonzero(np.diff(file_R[order_R])) + 1):
            if len(group):
                file, begin = self._file_and_start(int(file_R[group[0]]))
                for at, record in zip(group.tolist(), file.read((record_R[group] - begin).tolist()), strict=True):
                    found[at] = record
        return found

    def _file_and_start(self, number: int) -> tuple[DataFile, int]:
        """Returns a file, and the number of records in all files before it."""
        return self.files[number], self.ends[number - 1] if number else 0

    def _pick(self, raw: dict[str, Any], index: int) -> Record | Problem:
        try:
            return pick_fields(raw, self.fields)
        except UnusableRecord as error:
            file, begin = self._file_and_start(int(np.searchsorted(self.ends, index + self.low, side="right")))
            return Problem(where=file.where(index + self.low - begin), what=str(error))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ParallelSource(SourceBase):
    """Several sources of equal length, each of which gives one field."""

    content_id: str
    sources: tuple[FileSource, ...]

    def __len__(self) -> int:
        return len(self.sources[0])

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        return [_merge_fields(parts) for parts in zip(*(source.read(indices) for source in self.sources), strict=True)]


def _merge_fields(parts: Sequence[Record | Problem]) -> Record | Problem:
    record: Record = {}
    for part in parts:
        if isinstance(part, Problem):
            return part
        record |= part
    return record


def open_files(
    scheme: str, pattern: str, split: str, fields: Mapping[str, str], cache_dir: Path, header: bool = True
) -> FileSource:
    """Opens `scheme:pattern`, indexing new files. Raises UserError as `open_source` does."""
    base, start, stop = parse_split(split)
    found = find_files(scheme, pattern, base, FOLDER_NAME_PARTS.get(scheme, ()))

    def open_one(one: FoundFile) -> DataFile:
        return _open_data_file(scheme, plain_file(one, cache_dir), fields, cache_dir, header)

    files = map_in_threads(open_one, found, "indexing")
    ends = tuple(itertools.accumulate(len(file) for file in files))
    low, high = slice_bounds(start, stop, ends[-1])
    name = found[0].name if len(found) == 1 else f"{os.path.basename(pattern.rstrip('/'))}:{len(found)} files"
    kind = scheme if header else f"{scheme} without header"
    digest = _joint_digest([file.index.digest for file in files])
    source = FileSource(
        content_id=f"{kind}:{name}:{split}:{fields_id(fields)}:blake2b-{digest}",
        files=tuple(files),
        ends=ends,
        low=low,
        high=high,
        fields=fields,
    )
    _check_fields(source, HEADER_HINT if scheme == "tsv" and header else "")
    return source


def _open_data_file(scheme: str, file: PlainFile, fields: Mapping[str, str], cache_dir: Path, header: bool) -> DataFile:
    match scheme:
        case "parquet":
            return open_parquet(file, fields, cache_dir)
        case "tfrecord":
            return open_tf_record(file, cache_dir)
        case "arrayrecord":
            return open_array_record(file, cache_dir)
        case _:
            return open_line_file(scheme, file, cache_dir, header)


def open_parallel(pattern: str, split: str, fields: Mapping[str, str], cache_dir: Path) -> ParallelSource:
    """Opens `lines:pattern`, replacing "{field}" by each field's name. Raises UserError as `open_source` does."""
    if "{field}" not in pattern:
        raise UserError(f"lines:{pattern} must contain {{field}}, for example lines:/data/{{split}}.{{field}}.gz")
    of_split = pattern.replace("{split}", parse_split(split)[0])
    there = placeholder_values(of_split, "{field}")
    for ours, theirs in fields.items():
        if there and theirs not in there:
            raise UserError(f"source.{ours}: lines:{of_split} has no field {theirs!r}; {nearest(theirs, there)}")
    sources = {
        ours: open_files("text", pattern.replace("{field}", theirs), split, {ours: "text"}, cache_dir)
        for ours, theirs in fields.items()
    }
    counts = {ours: source.ends[-1] for ours, source in sources.items()}
    one, other = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[one] != counts[other]:
        torn = next((f"; {f.shown}: {f.index.torn}" for s in sources.values() for f in s.files if f.index.torn), "")
        raise UserError(
            f"lines:{of_split}: field {fields[one]!r} has {counts[one]} lines, but field {fields[other]!r} has "
            f"{counts[other]}; they must be equal{torn}"
        )
    digests = [f.index.digest for ours, source in sources.items() if ours != "group" for f in source.files]
    name = os.path.basename(of_split)
    return ParallelSource(
        content_id=f"lines:{name}:{split}:{fields_id(fields)}:blake2b-{_joint_digest(digests)}",
        sources=tuple(sources.values()),
    )


def fields_id(fields: Mapping[str, str]) -> str:
    """Returns the part of a content id that names the fields read, without "group", which models do not read."""
    numbers = f":numbers-{NUMBER_TEXT_VERSION}" if fields.keys() - {*TEXT_FIELDS, "group"} else ""
    return _named(fields) + numbers


def _named(fields: Mapping[str, str]) -> str:
    return ",".join(f"{ours}={theirs}" for ours, theirs in fields.items() if ours != "group")


def records_id(content_id: str, fields: Mapping[str, str], *, templated: bool) -> str:
    """Returns the part of a source's content id that names its records, whichever of their fields are read.

    >>> records_id("jsonl:a.jsonl:train:inputs=q,targets=a:blake2b-1f by templates 09", {"inputs": "q", "targets": "a"},
    ...     templated=True)
    'jsonl:a.jsonl:train:blake2b-1f'

    Args:
      fields: the fields that the source reads: our name -> the source's.
      templated: whether templates make inputs and targets from these fields.
    """
    untemplated = content_id.rpartition(" by templates ")[0] if templated else content_id
    without_fields = untemplated.replace(f":{_named(fields)}:", ":", 1)
    return without_fields.replace(f":numbers-{NUMBER_TEXT_VERSION}:", ":", 1)


def _joint_digest(digests: Sequence[str]) -> str:
    """Returns one hash of several files' hashes; that of a single file is its own."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()


def _check_fields(source: FileSource, column_hint: str) -> None:
    """Raises UserError for a field that is no column of a file, or that none of the first records has."""
    for file in source.files:
        for ours, theirs in source.fields.items():
            if file.columns is None:
                continue
            column = theirs if theirs in file.columns else theirs.split(".")[0]
            if column not in file.columns:
                hint = nearest(theirs, file.columns)
                raise UserError(f"source.{ours}: {file.shown} has no field {theirs!r}; {hint}{column_hint}")
            if (count := file.columns.count(column)) > 1:
                raise UserError(f"source.{ours}: {file.shown} has {count} columns named {column!r}; rename all but one")
    raws = [raw for raw in source.raw(range(min(RECORDS_CHECKED, len(source)))) if not isinstance(raw, Problem)]
    for ours, theirs in source.fields.items():
        if raws and not any(_may_have(raw, theirs) for raw in raws):
            names = {path for raw in raws for path in field_paths(raw)}
            raise UserError(f"source.{ours}: {source.files[0].shown} has no field {theirs!r}; {nearest(theirs, names)}")


def _may_have(raw: Mapping[str, Any], path: str) -> bool:
    """Returns False if a name of `path` is missing; True even if null or a short list ends the path early."""
    if path in raw:
        return True
    value: Any = raw
    for part in path.split("."):
        if isinstance(value, Mapping):
            if part not in value:
                return False
            value = value[part]
        elif is_list(value) and part.isdecimal():
            if int(part) >= len(value):
                return True
            value = value[int(part)]
        else:
            return value is None
    return True
