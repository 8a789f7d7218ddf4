"""What is kept of a data file so that it need not be read again: where its records start, and a hash of its bytes."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np

from common.data.cache import build_once
from common.data.progress import bar
from common.data.sources.packed_files import PlainFile, file_key

T = TypeVar("T")
R = TypeVar("R")
FORMAT = 1
"""Part of the cache's key: raise it with any change of what is stored."""
THREADS = 16
MAPS_KEPT = 4096
STARTS = "starts.npy"
ABOUT = "about.json"


class Index(NamedTuple):
    """What is kept of one file."""

    folder: Path
    records: int
    """How many, the one that stands for a tear included."""
    digest: str
    """BLAKE2b of the file's bytes; differs too where it is torn."""
    torn: str
    """Why the last record cannot be read: the file ends in the middle of it. Empty where the file is whole."""
    columns: tuple[str, ...]
    """Names of all fields, where the file says them once for all records."""

    @property
    def starts(self) -> np.ndarray:
        """Where records start, int64, memory map_integers; in which unit is the format's own."""
        return map_integers(self.folder / STARTS)


class IndexResult(NamedTuple):
    """What indexing a file finds out, besides what it writes."""

    records: int
    digest: str
    torn: str = ""
    columns: tuple[str, ...] = ()


def open_index(kind: str, file: PlainFile, cache_dir: Path, build: Callable[[PlainFile, Path], IndexResult]) -> Index:
    """The index of a file: from the cache, or made by `build(file, path of starts.npy)`."""

    def make(part: Path) -> None:
        part.mkdir()
        (part / ABOUT).write_text(json.dumps(build(file, part / STARTS)._asdict()))

    key = hashlib.blake2b(repr((FORMAT, kind, file.torn, file_key(file.path))).encode(), digest_size=16).hexdigest()
    folder = build_once(cache_dir / "indexes" / key, make)
    about = json.loads((folder / ABOUT).read_text())
    return Index(folder, about["records"], about["digest"], about["torn"], tuple(about["columns"]))


def write_integers(path: Path, parts: Iterable[np.ndarray]) -> int:
    """Writes int64 pieces into one flat .npy file, a piece in memory at a time, and returns how many numbers."""
    count = 0
    with open(path, "wb") as file:
        _write_npy_header(file, 0)
        start = file.tell()
        for part in parts:
            file.write(part.astype("<i8").tobytes())
            count += len(part)
        file.seek(0)
        _write_npy_header(file, count)
        # NumPy leaves room in a header for the first axis to grow; were that to end, the file would be torn.
        assert file.tell() == start
    return count


def file_digest(path: Path, torn: str = "") -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(torn.encode(), digest_size=16))
    return digest.hexdigest()


def map_in_threads(function: Callable[[T], R], items: Sequence[T], title: str) -> list[R]:
    """`function` of every item, in order, under a progress bar. The first to fail ends it."""
    with ThreadPoolExecutor(min(THREADS, max(len(items), 1))) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in bar(futures, title)]
        finally:
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(MAPS_KEPT)
def map_integers(path: Path) -> np.ndarray:
    """The memory-map_integers array that `write_integers` wrote."""
    # A plain view slices faster than np.memmap does.
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _write_npy_header(file: BinaryIO, count: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
