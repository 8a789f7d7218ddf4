"""Detects damaged files: their sizes and hashes are stored with them and checked once on each machine."""

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import UserError
from common.files import read_json, write_json
from common.progress import spinner

THREADS = 8
SHOWN_BYTES = 1 << 28
"""Files of more bytes in total show a progress message while they are hashed."""


def file_hash(path: Path) -> str:
    """Returns a file's BLAKE2b, 128 bits in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_sums(path: Path, sums: Path) -> None:
    """Syncs the file `path`, or all files of that folder, to disk, and writes their sizes and hashes to `sums`."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for each in {*files, *(file.parent for file in files)}:
        sync(each)
    found = zip(files, _hashes(files), strict=True)
    write_json(sums, {os.path.relpath(file, path): [file.stat().st_size, digest] for file, digest in found})
    sync(sums.parent)


def damage(path: Path, sums: Path) -> str | None:
    """Returns how the file or folder `path` differs from the record of `write_sums`; None if it does not.

    A file is not hashed again if its times, size and inode are those of the file that passed on this machine.
    """
    try:
        expected = {path / name: (int(size), str(digest)) for name, (size, digest) in read_json(sums).items()}
    except (UserError, AttributeError, TypeError, ValueError):
        return f"{sums} cannot be read" if sums.exists() else "it has no list of hashes"
    known = _read_stamp(sums)
    for file, (size, _) in expected.items():
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, not {size}"
    unknown = [file for file in expected if known.get(str(file)) != _state(file)]
    for file, digest in zip(unknown, _hashes(unknown), strict=True):
        if digest != expected[file][1]:
            return f"{file} has another hash"
    if unknown:
        remember(expected, sums)
    return None


def is_right(file: Path, digest: str, stamp: Path) -> bool:
    """Returns whether a file's hash is `digest`; remembers a match in a file next to `stamp`, which need not exist."""
    if _read_stamp(stamp).get(str(file)) == _state(file):
        return True
    matches = file_hash(file) == digest
    if matches:
        remember([file], stamp)
    return matches


def remember(files: Iterable[Path], sums: Path) -> None:
    """Records that these files, as they are now, have passed on this machine; does nothing in a read-only cache."""
    with contextlib.suppress(OSError):
        write_json(_stamp(sums), {str(file): _state(file) for file in files})


def sync(path: Path) -> None:
    """Syncs a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hashes(files: list[Path]) -> list[str]:
    total = sum(file.stat().st_size for file in files)
    shown = spinner(f"checking {total / 1e9:.1f} GB") if total > SHOWN_BYTES else contextlib.nullcontext()
    with shown, ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(file_hash, files))


def _state(file: Path) -> list[int]:
    """Returns values that change with every write: a program cannot set the inode's change time."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _stamp(sums: Path) -> Path:
    """Returns the path of this machine's record of files that have passed."""
    return sums.with_name(f"{sums.name}-{socket.gethostname()}")


def _read_stamp(sums: Path) -> dict[str, list[int]]:
    try:
        found = read_json(_stamp(sums))
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}
