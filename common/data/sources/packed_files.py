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
from typing import Any, BinaryIO, NamedTuple

from common.data.cache import build_once
from common.data.sources.files import FoundFile, file_system, reading
from common.errors import UserError

CHUNK_BYTES = 1 << 20
ZSTD_CHUNK_BYTES = 1 << 16
FORMAT = 1
"""Part of the cache's keys: raise it with any change of what is stored."""
UNPACKED_FORMAT = 2
"""The same for what unpacking writes."""
MEMORY_BYTES = 1 << 28
"""The memory that unpacking a file may take; `xz -9` needs a quarter. zstd has its own limit, a window of 128 MiB."""


class PlainFile(NamedTuple):
    """A file whose bytes can be read where they lie."""

    shown: str
    """As it was found, for messages."""
    path: Path
    torn: str
    """How a packed file ended too early; empty where it is whole."""


def plain_file(found: FoundFile, cache_dir: Path) -> PlainFile:
    """Fetches and unpacks what needs it. Raises UserError where a file cannot be fetched or is not packed at all."""
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
    """Names a file on this machine with this size and time of change."""
    stat = path.stat()
    return _cache_key(str(path.absolute()), stat.st_size, stat.st_mtime_ns)


def _cache_key(*parts: object) -> str:
    return hashlib.blake2b(repr((FORMAT, *parts)).encode(), digest_size=16).hexdigest()


def _fetch(found: FoundFile, cache_dir: Path) -> Path:
    def fetch(part: Path) -> None:
        with reading(found.shown):
            file_system(found.shown).get_file(found.shown, str(part))
        if found.size not in (None, part.stat().st_size):
            raise UserError(f"{found.shown} has {found.size} bytes, but {part.stat().st_size} arrived; try again")

    return build_once(cache_dir / "fetched" / _cache_key(*found), fetch)


def _unpack(shown: str, chunks: Iterator[bytes], folder: Path) -> None:
    """Writes what can be unpacked to `folder`/data, and to `folder`/torn why that is not all."""
    folder.mkdir()
    torn = ""
    with open(folder / "data", "wb") as out:
        try:
            for chunk in chunks:
                out.write(chunk)
        except UNPACKING_ERRORS as error:
            if isinstance(error, OSError) and error.errno:  # a disk or a network, not the file
                raise UserError(f"{shown} cannot be unpacked into {folder.parent}: {error}") from error
            if any(words in str(error) for words in TOO_LARGE):
                raise UserError(
                    f"{shown} was packed with so long a window that unpacking it takes more than "
                    f"{MEMORY_BYTES >> 20} MiB of memory ({error}); pack it again, by zstd without --long or by xz -9"
                ) from error
            early = isinstance(error, EOFError) or "Truncated" in str(error)
            if not early and not out.tell():
                raise UserError(f"{shown} is not packed as its name says, or damaged: {error}") from error
            torn = f"the packed file ends in the middle of its data, or is damaged there ({error})"
    (folder / "torn").write_text(torn)


def _unpack_gzip(packed: BinaryIO) -> Iterator[bytes]:
    with gzip.open(packed) as file:
        while chunk := file.read1(CHUNK_BYTES):  # read() would lose what stands before a tear
            yield chunk


def _unpack_streams(new: Callable[[], Any], packed: BinaryIO) -> Iterator[bytes]:
    """All of a file of one stream after another, with or without zero bytes between them.

    `bz2.open` and `lzma.open` take a later stream that begins damaged, and padding, for the end of the file.

    Args:
      new: makes what unpacks one stream, a `BZ2Decompressor` or its like.
    """
    rest = packed.read(CHUNK_BYTES)
    while rest:
        stream = new()
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
    done = 0
    with contextlib.suppress(OSError), _zstd_stream(packed) as stream:
        while chunk := stream.read(ZSTD_CHUNK_BYTES):
            yield chunk
            done += len(chunk)
        return
    # The call that failed at a tear lost what it had unpacked, so the second time the last part goes byte by byte.
    with _zstd_stream(packed) as stream:
        while done:
            done -= len(stream.read(min(done, ZSTD_CHUNK_BYTES)))
        while byte := stream.read(1):
            yield byte


def _zstd_stream(packed: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(packed.name), "zstd")


UNPACKING_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""The errors that unpackers raise for a damaged file, and for a disk or a network that fails."""
TOO_LARGE = ("Memory usage limit", "too much memory")
"""Parts of the messages of liblzma and zstd for a window that exceeds the memory limit."""
UNPACKERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    ".gz": _unpack_gzip,
    ".bz2": functools.partial(_unpack_streams, bz2.BZ2Decompressor),
    ".xz": functools.partial(_unpack_streams, functools.partial(lzma.LZMADecompressor, memlimit=MEMORY_BYTES)),
    ".zst": _unpack_zstd,
}
"""A name's ending -> the content of a file, in pieces; its reading is done when the last piece is taken."""
