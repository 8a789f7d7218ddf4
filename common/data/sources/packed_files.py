"""Files as plain bytes on this machine: fetched from buckets and unpacked into the cache, once."""

import bz2
import contextlib
import functools
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.data.cache import build_once
from common.data.sources.files import Found, file_system, reading
from common.errors import UserError

CHUNK_BYTES = 1 << 20
ZSTD_CHUNK_BYTES = 1 << 16
FORMAT = 1
"""Part of the cache's keys: raise it with any change of what is stored."""


class PlainFile(NamedTuple):
    """A file whose bytes can be read where they lie."""

    shown: str
    """As it was found, for messages."""
    path: Path
    torn: str
    """How a packed file ended too early; empty where it is whole."""


def plain_file(found: Found, cache_dir: Path) -> PlainFile:
    """Fetches and unpacks what needs it. Raises UserError where a file cannot be fetched or is not packed at all."""
    path = _fetched(found, cache_dir) if "://" in found.shown else Path(found.shown).absolute()
    suffix = os.path.splitext(found.name)[1]
    if suffix not in UNPACKERS:
        return PlainFile(shown=found.shown, path=path, torn="")
    folder = build_once(
        cache_dir / "unpacked" / file_key(path), lambda part: _unpack(found.shown, UNPACKERS[suffix](path), part)
    )
    return PlainFile(shown=found.shown, path=folder / "data", torn=(folder / "torn").read_text())


def file_key(path: Path) -> str:
    """Names a file on this machine with this size and time of change."""
    stat = path.stat()
    return _key(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


def _key(*parts: object) -> str:
    return hashlib.blake2b(repr((FORMAT, *parts)).encode(), digest_size=16).hexdigest()


def _fetched(found: Found, cache_dir: Path) -> Path:
    def fetch(part: Path) -> None:
        with reading(found.shown):
            file_system(found.shown).get_file(found.shown, str(part))
        if found.size not in (None, part.stat().st_size):
            raise UserError(f"{found.shown} has {found.size} bytes, but {part.stat().st_size} arrived; try again")

    return build_once(cache_dir / "fetched" / _key(*found), fetch)


def _unpack(shown: str, chunks: Iterator[bytes], folder: Path) -> None:
    """Writes what can be unpacked to `folder`/data, and to `folder`/torn why that is not all."""
    folder.mkdir()
    torn = ""
    with open(folder / "data", "wb") as out:
        try:
            for chunk in chunks:
                out.write(chunk)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            if isinstance(error, OSError) and error.errno:  # a disk or a network, not the file
                raise UserError(f"{shown} cannot be unpacked into {folder.parent}: {error}") from error
            early = isinstance(error, EOFError) or "Truncated" in str(error)
            if not early and not out.tell():
                raise UserError(f"{shown} is not packed as its name says, or damaged: {error}") from error
            torn = f"the packed file ends in the middle of its data, or is damaged there ({error})"
    (folder / "torn").write_text(torn)


def _unpacked(opened: Callable[[Path], Any], path: Path) -> Iterator[bytes]:
    if path.stat().st_size:
        with opened(path) as file:
            while chunk := file.read1(CHUNK_BYTES):  # read() would lose what stands before a tear
                yield chunk


def _unzstd(path: Path) -> Iterator[bytes]:
    done = 0
    with contextlib.suppress(OSError), _zstd_stream(path) as stream:
        while chunk := stream.read(ZSTD_CHUNK_BYTES):
            yield chunk
            done += len(chunk)
        return
    # The call that failed at a tear lost what it had unpacked, so the second time the last part goes byte by byte.
    with _zstd_stream(path) as stream:
        while done:
            done -= len(stream.read(min(done, ZSTD_CHUNK_BYTES)))
        while byte := stream.read(1):
            yield byte


def _zstd_stream(path: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


UNPACKERS: dict[str, Callable[[Path], Iterator[bytes]]] = {
    ".gz": functools.partial(_unpacked, gzip.open),
    ".bz2": functools.partial(_unpacked, bz2.open),
    ".xz": functools.partial(_unpacked, lzma.open),
    ".zst": _unzstd,
}
"""A name's ending -> the file's content, in pieces."""
