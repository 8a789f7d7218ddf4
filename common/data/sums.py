"""Whether files are what was written: their sizes and hashes stand beside them, and are compared once a machine."""

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.data.progress import spinner
from common.errors import UserError
from common.files import read_json, write_json

THREADS = 8
SHOWN_BYTES = 1 << 28
"""Reading more than that is worth a word."""


def file_hash(path: Path) -> str:
    """BLAKE2b, 128 bits, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_sums(path: Path, sums: Path) -> None:
    """Brings the file `path`, or all files of that folder, onto the disk; writes their sizes and hashes to `sums`."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for each in {*files, *(file.parent for file in files)}:
        sync(each)
    found = zip(files, _hashes(files), strict=True)
    write_json(sums, {os.path.relpath(file, path): [file.stat().st_size, digest] for file, digest in found})
    sync(sums.parent)


def damage(path: Path, sums: Path) -> str | None:
    """How the file or folder `path` differs from what `write_sums` saw; None where it does not.

    A file is not read again that is, by its times, size and inode, the one that was found right on this machine.
    """
    try:
        expected = {path / name: (int(size), str(digest)) for name, (size, digest) in read_json(sums).items()}
    except (UserError, AttributeError, TypeError, ValueError):
        return f"{sums} cannot be read" if sums.exists() else "there is no list of its hashes"
    known = _read_stamp(sums)
    for file, (size, _) in expected.items():
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, not {size}"
    unknown = [file for file in expected if known.get(str(file)) != _state(file)]
    for file, digest in zip(unknown, _hashes(unknown), strict=True):
        if digest != expected[file][1]:
            return f"{file} holds other bytes"
    if unknown:
        remember(expected, sums)
    return None


def is_right(file: Path, digest: str, stamp: Path) -> bool:
    """Whether a file's hash is `digest`; remembers that beside `stamp`, which need not exist."""
    if _read_stamp(stamp).get(str(file)) == _state(file):
        return True
    right = file_hash(file) == digest
    if right:
        remember([file], stamp)
    return right


def remember(files: Iterable[Path], sums: Path) -> None:
    """Records, for this machine, that these files are right as they are now; does nothing in a read-only cache."""
    with contextlib.suppress(OSError):
        write_json(_stamp(sums), {str(file): _state(file) for file in files})


def sync(path: Path) -> None:
    """Brings a file, or a folder's list of names, onto the disk."""
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
    """Changes with every write: the time of the last change of a file's entry cannot be set."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _stamp(sums: Path) -> Path:
    return sums.with_name(f"{sums.name}-{socket.gethostname()}")


def _read_stamp(sums: Path) -> dict[str, list[int]]:
    try:
        found = read_json(_stamp(sums))
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}
