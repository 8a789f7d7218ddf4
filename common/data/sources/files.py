"""Finds the files that a source's name means: splits, slices, globs, folders, buckets, complete sets of shards."""

import contextlib
import fnmatch
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from common.data.sources.records import first_line
from common.errors import UserError, nearest

ONLY_SPLIT = "train"
STAMPS = ("generation", "etag", "ETag", "mtime", "updated", "LastModified", "last_modified", "modified", "created")
"""Names that file systems give to whatever changes when a file's content does."""
MISSING_SHOWN = 5
SHARD_NAME = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")


class FoundFile(NamedTuple):
    """A file before it is fetched or unpacked."""

    shown: str
    """Path or url, for messages."""
    size: int | None
    """In bytes; None if the server does not report it."""
    stamp: str
    """Changes with the content, as far as the file system can tell without reading it."""

    @property
    def name(self) -> str:
        return self.shown.rsplit("/", 1)[-1]


def parse_split(split: str) -> tuple[str, str, str]:
    """Returns a split's name and the bounds of its slice, as written.

    >>> parse_split("train[:95%]"), parse_split("test")
    (('train', '', '95%'), ('test', '', ''))

    Raises UserError for anything but a name or a slice of one.
    """
    match = re.fullmatch(r"(\w[\w.-]*)(?:\[(-?\d*%?):(-?\d*%?)\])?", split)
    bounds = match.groups("")[1:] if match else ()
    if not match or any(bound in ("-", "%", "-%") for bound in bounds):
        raise UserError(f"split {split!r} must be a name or a slice of one, for example 'train[:1%]' or 'train[1000:]'")
    return match[1], bounds[0], bounds[1]


def slice_bounds(start: str, stop: str, count: int) -> tuple[int, int]:
    """Returns the slice's first record and its end, by TFDS's rules (percentages round to the closest record).

    >>> slice_bounds("", "1%", 250), slice_bounds("-10", "", 250), slice_bounds("90%", "999", 250)
    ((0, 2), (240, 250), (225, 250))
    """

    def resolve(bound: str, default: int) -> int:
        if not bound:
            return default
        number = round(int(bound[:-1]) * count / 100) if bound.endswith("%") else int(bound)
        return min(max(number + count if number < 0 else number, 0), count)

    low = resolve(start, 0)
    return low, max(resolve(stop, count), low)


def find_files(scheme: str, pattern: str, split: str, in_folder: Sequence[str] = ()) -> list[FoundFile]:
    """Returns the files of a split, sorted by name; at least one.

    Args:
      scheme: the source's scheme, for messages.
      pattern: a path or url, which may contain "{split}" and be a glob.
      split: the split's name, without a slice.
      in_folder: if `pattern` is a folder, selects its files whose names contain one of these; empty for formats that
        are not read by folder.

    Raises UserError, naming the nearest choice, if there is no such file or split, if shards of a set
    "NAME-00003-of-00010" are missing, or if a bucket cannot be read.
    """
    if "{split}" not in pattern and split != ONLY_SPLIT:
        raise UserError(
            f"{scheme}:{pattern} has no {{split}} in its path, so its only split is {ONLY_SPLIT!r}, not {split!r}; "
            f"slice it (for example {ONLY_SPLIT + '[95%:]'!r}) or put {{split}} into the path"
        )
    path = pattern.replace("{split}", split)
    storage = _storage(path)
    wanted = path
    if in_folder and storage.is_folder(path):
        wanted = path.rstrip("/") + "/*"
        found = [file for file in storage.find(wanted) if any(part in file.name for part in in_folder)]
        if not found:
            raise UserError(f"{scheme}:{path}: no file in this folder is named *{' or *'.join(in_folder)}*")
    else:
        found = storage.find(path)
    if not found:
        raise UserError(_no_such_file(scheme, pattern, split, path, storage.find))
    _check_shards_complete(scheme, wanted.rsplit("/", 1)[-1], found)
    return found


def placeholder_values(
    pattern: str, placeholder: str, find: Callable[[str], list[FoundFile]] | None = None
) -> list[str]:
    """Returns what existing files have in place of a placeholder, for example the names of their splits.

    Args:
      pattern: a path or url that contains `placeholder`; each occurrence must have the same value.
      placeholder: for example "{split}".
      find: lists the files of a glob; by default on the pattern's own file system.
    """
    pattern = pattern if "://" in pattern else os.path.expanduser(pattern)
    shape = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    shape = shape.replace(re.escape(placeholder), r"([\w.-]+?)", 1).replace(re.escape(placeholder), r"\1")
    there = (find or _storage(pattern).find)(pattern.replace(placeholder, "*"))
    return sorted({match[1] for file in there if (match := re.fullmatch(shape, file.shown))})


def _no_such_file(scheme: str, pattern: str, split: str, path: str, find: Callable[[str], list[FoundFile]]) -> str:
    """Returns the message for a missing file or split, with the nearest one that exists."""
    if "{split}" in pattern:
        splits = placeholder_values(pattern, "{split}", find) or placeholder_values(
            pattern.rstrip("/") + "/*", "{split}", find
        )
        return f"{scheme}:{pattern} has no split {split!r} (no file {path}); {nearest(split, splits)}"
    folder, _, name = path.rpartition("/")
    close = nearest(name, [file.name for file in find(f"{folder}/*" if folder else "*")]).partition("?")
    return f"{scheme}:{path}: no such file" + (f"; {close[0]}?" if close[1] else "")


def _check_shards_complete(scheme: str, wanted: str, found: Sequence[FoundFile]) -> None:
    """Raises UserError if a shard that `wanted` matches is missing; `wanted` is the last part of a path or glob."""
    sets: dict[tuple[str, str, int, str, str], set[int]] = {}
    for file in found:
        folder, _, name = file.shown.rpartition("/")
        if match := SHARD_NAME.fullmatch(name):
            before, number, count, after = match.groups()
            sets.setdefault((folder, before, len(number), count, after), set()).add(int(number))
    for (folder, before, digits, count, after), there in sets.items():
        first = 1 if int(count) in there and 0 not in there else 0
        names = {n: f"{before}{n:0{digits}}-of-{count}{after}" for n in range(first, first + int(count))}
        missing = [name for n, name in names.items() if n not in there and fnmatch.fnmatchcase(name, wanted)]
        if missing:
            more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
            raise UserError(
                f"{scheme}:{folder}/{wanted}: {len(missing)} of {count} files are missing: "
                f"{', '.join(missing[:MISSING_SHOWN])}{more}; put them there, or name the files to read one by one"
            )


class _LocalFiles:
    """The local file systems."""

    def find(self, path: str) -> list[FoundFile]:
        here = os.path.expanduser(path)
        there = [here] if os.path.isfile(here) else sorted(glob.glob(here, recursive=True))
        return [self._found(name) for name in there if os.path.isfile(name)]

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(os.path.expanduser(path))

    def _found(self, path: str) -> FoundFile:
        stat = os.stat(path)
        return FoundFile(shown=path, size=stat.st_size, stamp=str(stat.st_mtime_ns))


class _RemoteFiles:
    """A remote file system, through fsspec."""

    def __init__(self, url: str) -> None:
        self._system = file_system(url)
        self._start = re.match(r"[^:]*://+", url)[0]  # type: ignore[index]

    def find(self, path: str) -> list[FoundFile]:
        with reading(path):
            if self._system.isfile(path):
                return [self._found(self._system.info(path))]
            there = self._system.glob(path) if glob.has_magic(path) else []
            infos = [self._system.info(name) for name in sorted(there)]
        return [self._found(info) for info in infos if info["type"] == "file"]

    def is_folder(self, path: str) -> bool:
        with reading(path):
            return self._system.isdir(path)

    def _found(self, info: dict[str, Any]) -> FoundFile:
        stamps = {stamp: str(info[stamp]) for stamp in STAMPS if info.get(stamp) is not None}
        return FoundFile(shown=self._start + str(info["name"]).lstrip("/"), size=info["size"], stamp=str(stamps))


def _storage(path: str) -> _LocalFiles | _RemoteFiles:
    return _RemoteFiles(path) if "://" in path else _LocalFiles()


def file_system(url: str) -> Any:
    """Returns the fsspec file system of `url`, PROTOCOL://PATH. Raises UserError if none is known or installed."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or str(error)
        raise UserError(f"{url}: {protocol}:// needs a package: pip install {missing}") from error
    except ValueError as error:
        raise UserError(f"{url}: unknown protocol; {nearest(protocol, fsspec.available_protocols())}") from error


@contextlib.contextmanager
def reading(url: str) -> Iterator[None]:
    """Turns any error of a file system into a UserError, since each file system raises its own types."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{url} cannot be read: {first_line(error)}") from error
