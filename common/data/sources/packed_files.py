"""Fetches remote files and unpacks compressed ones into the cache, once."""

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
from typing import Any, BinaryIO, NamedTuple

from common.data.cache import build_once
from common.data.sources.files import FoundFile, file_system, reading
from common.errors import UserError

CHUNK_BYTES = 1 << 20
ZSTD_CHUNK_BYTES = 1 << 16
FORMAT = 1
"""Part of the cache's keys: raise it with any change of what the cache stores."""
UNPACKED_FORMAT = 2
"""As `FORMAT`, for unpacked files alone."""
MEMORY_BYTES = 1 << 28
"""The most memory liblzma may use to unpack a file; one packed by `xz -9` needs a quarter of it. zstd has its own
limit, a window of 128 MiB."""


class PlainFile(NamedTuple):
    """A local, uncompressed file."""

    shown: str
    """Path or url of the original file, for messages."""
    path: Path
    torn: str
    """How the packed file ended too early; "" if it is whole."""


def plain_file(found: FoundFile, cache_dir: Path) -> PlainFile:
    """Returns a local, uncompressed file with the content of `found`: the file itself, or a copy in the cache.

    Raises UserError if it cannot be fetched, or is not packed as its name says.
    """
    path = _fetch(found, cache_dir) if "://" in found.shown else Path(found.shown).absolute()
    suffix = os.path.splitext(found.name)[1]
    if suffix not in UNPACKERS:
        return PlainFile(shown=found.shown, path=path, torn="")

    def build(part: Path) -> None:
        with open(path, "rb") as packed:
            _unpack(found.shown, UNPACKERS[suffix](packed), part)

    folder = build_once(cache_dir / "unpacked" / _cache_key(UNPACKED_FORMAT, file_key(path)), build)
    return PlainFile(shown=found.shown, path=folder / "data", torn=(folder / "torn").read_text())


def file_key(path: Path) -> str:
    """Returns a cache key of a local file: a hash of its path, size and modification time."""
    stat = path.stat()
    return _cache_key(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


def _cache_key(*parts: object) -> str:
    return hashlib.blake2b(repr((FORMAT, *parts)).encode(), digest_size=16).hexdigest()


def _fetch(found: FoundFile, cache_dir: Path) -> Path:
    """Returns the local copy of a remote file, downloading it if it is not in the cache."""

    def fetch(part: Path) -> None:
        with reading(found.shown):
            file_system(found.shown).get_file(found.shown, str(part))
        if found.size not in (None, part.stat().st_size):
            raise UserError(f"{found.shown} has {found.size} bytes, but {part.stat().st_size} arrived; try again")

    return build_once(cache_dir / "fetched" / _cache_key(*found), fetch)


def _unpack(shown: str, chunks: Iterator[bytes], folder: Path) -> None:
    """Writes what can be unpacked to `folder`/data, and why the rest cannot to `folder`/torn (empty if all can)."""
    folder.mkdir()
    torn = ""
    with open(folder / "data", "wb") as out:
        try:
            for chunk in chunks:
                out.write(chunk)
        except UNPACKING_ERRORS as error:
            if isinstance(error, OSError) and error.errno:  # the disk or network failed, the file is not damaged
                raise UserError(f"{shown} cannot be unpacked into {folder.parent}: {error}") from error
            for words, reason in TOO_LARGE.items():
                if words in str(error):
                    advice = "pack it again, with zstd without --long or with xz -9"
                    raise UserError(f"{shown}: {reason} ({error}); {advice}") from error
            cut_short = isinstance(error, EOFError) or "Truncated" in str(error)
            if not cut_short and not out.tell():
                raise UserError(f"{shown} is damaged, or not packed as its name says: {error}") from error
            torn = f"the packed file ends in the middle of its data, or is damaged there ({error})"
    (folder / "torn").write_text(torn)


def _unpack_gzip(packed: BinaryIO) -> Iterator[bytes]:
    with gzip.open(packed) as file:
        while chunk := file.read1(CHUNK_BYTES):  # read() would lose the data before a tear
            yield chunk


def _unpack_streams(new_decompressor: Callable[[], Any], packed: BinaryIO) -> Iterator[bytes]:
    """Unpacks a file of several streams, with or without zero bytes between them.

    `bz2.open` and `lzma.open` take padding, or a later stream with a damaged head, for the end of the file.

    Args:
      new_decompressor: makes the decompressor of one stream, for example `bz2.BZ2Decompressor`.
      packed: the packed file.
    """
    rest = packed.read(CHUNK_BYTES)
    while rest:
        stream = new_decompressor()
        yield stream.decompress(rest, CHUNK_BYTES)
        while not stream.eof:
            rest = packed.read(CHUNK_BYTES) if stream.needs_input else b""
            if stream.needs_input and not rest:
                raise EOFError("the file ends before the stream does")
            yield stream.decompress(rest, CHUNK_BYTES)
        rest = stream.unused_data.lstrip(b"\0")
        while not rest and (more := packed.read(CHUNK_BYTES)):
            rest = more.lstrip(b"\0")


def _unpack_zstd(packed: BinaryIO) -> Iterator[bytes]:
    """Yields all data that precede any damage, though a failing read of pyarrow drops what it had unpacked."""
    done = 0
    with contextlib.suppress(OSError), _zstd_stream(packed) as stream:
        while chunk := stream.read(ZSTD_CHUNK_BYTES):
            yield chunk
            done += len(chunk)
        return
    # Start again: skip what was yielded, then read byte by byte up to the damage, where this raises the error.
    with _zstd_stream(packed) as stream:
        while done:
            done -= len(stream.read(min(done, ZSTD_CHUNK_BYTES)))
        while byte := stream.read(1):
            yield byte


def _zstd_stream(packed: BinaryIO) -> Any:
    """Opens the file again, from its start."""
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(packed.name), "zstd")


UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What unpackers raise for a damaged file; an OSError with an errno means a failing disk or network instead."""
TOO_LARGE = {
    "Memory usage limit": f"unpacking takes more than {MEMORY_BYTES >> 20} MiB of memory, since its window is too long",
    "too much memory": "its window is longer than 128 MiB, the most that zstd allows",
}
"""By what liblzma and zstd write when a window exceeds their limit: the reason to show."""
UNPACKERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".gz": _unpack_gzip,
    ".bz2": functools.partial(_unpack_streams, bz2.BZ2Decompressor),
    ".xz": functools.partial(_unpack_streams, functools.partial(lzma.LZMADecompressor, memlimit=MEMORY_BYTES)),
    ".zst": _unpack_zstd,
}
"""Suffix of a file's name -> the function that yields its content in pieces, reading the file as it goes."""
