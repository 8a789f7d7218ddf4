"""Cached indexes of data files: where the records start, and a hash of the file's bytes."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from common.data.cache import build_once
from common.data.sources.packed_files import PlainFile, file_key
from common.progress import tracked

T = TypeVar("T")
R = TypeVar("R")
FORMAT = 1
"""Part of the cache's key: raise it with any change of what an index stores."""
THREADS = 16
MAPS_KEPT = 4096
STARTS = "starts.npy"
ABOUT = "about.json"


class Index(NamedTuple):
    """The cached index of one file."""

    folder: Path
    records: int
    """How many, including the one that stands for a tear."""
    digest: str
    """BLAKE2b of `torn` and the file's bytes. It is part of content ids, so rewording `torn` changes these."""
    torn: str
    """Why the last record cannot be read (the file ends in the middle of it); "" if the file is whole."""
    columns: tuple[str, ...]
    """The names of all fields, if the file names them once for all records."""

    @property
    def starts(self) -> np.ndarray:
        """int64, memory-mapped: where records start, in the unit of the file's format."""
        return map_integers(self.folder / STARTS)


class IndexResult(NamedTuple):
    """The result of indexing a file; its fields are those of `Index`."""

    records: int
    digest: str
    torn: str = ""
    columns: tuple[str, ...] = ()


def open_index(kind: str, file: PlainFile, cache_dir: Path, build: Callable[[PlainFile, Path], IndexResult]) -> Index:
    """Returns the cached index of a file, or makes it with `build(file, path of starts.npy)`."""

    def make(part: Path) -> None:
        part.mkdir()
        (part / ABOUT).write_text(json.dumps(build(file, part / STARTS)._asdict()))

    key = hashlib.blake2b(repr((FORMAT, kind, file.torn, file_key(file.path))).encode(), digest_size=16).hexdigest()
    folder = build_once(cache_dir / "indexes" / key, make)
    about = json.loads((folder / ABOUT).read_text())
    return Index(folder, about["records"], about["digest"], about["torn"], tuple(about["columns"]))


def write_integers(path: Path, parts: Iterable[np.ndarray]) -> int:
    """Writes int64 arrays to one flat .npy file, one array in memory at a time. Returns how many numbers it wrote."""
    count = 0
    with open(path, "wb") as file:
        _write_npy_header(file, 0)
        start = file.tell()
        for part in parts:
            file.write(part.astype("<i8").tobytes())
            count += len(part)
        file.seek(0)
        _write_npy_header(file, count)
        # NumPy leaves room in the header for a longer shape; without it the second header would overwrite data.
        assert file.tell() == start
    return count


def file_digest(path: Path, torn: str = "") -> str:
    """Returns the hexadecimal BLAKE2b hash of `torn` and a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(torn.encode(), digest_size=16))
    return digest.hexdigest()


def map_in_threads(function: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """Returns `function(item)` for each item, in order, with a progress bar. The first error cancels the rest."""
    with ThreadPoolExecutor(min(THREADS, max(len(items), 1))) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in tracked(futures, title)]
        finally:
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(MAPS_KEPT)
def map_integers(path: Path) -> np.ndarray:
    """Returns the memory-mapped array that `write_integers` wrote."""
    # Slicing a plain view is faster than slicing an np.memmap.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _write_npy_header(file: BinaryIO, count: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
