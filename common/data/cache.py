"""The one folder for everything that can be rebuilt: a thing in it is built exactly once, and used only if it is what
was written."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common.data.sums import damage, remember, sync, write_sums
from common.paths import user_path
from common.terminal import harmless


def default_cache_dir() -> Path:
    """`$TWINSTACK_CACHE`, or the folder `twinstack` in the platform's own place for caches."""
    if named := os.environ.get("TWINSTACK_CACHE"):
        return user_path(named, "$TWINSTACK_CACHE")
    if sys.platform == "darwin":
        return user_path("~") / "Library" / "Caches" / "twinstack"
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "twinstack"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock between processes, on a file beside `path`; the system frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(harmless(f"waiting for another process that makes {path}"), file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Makes the file or folder `path` unless it is there and is what was written, and returns it.

    `build` is given a path in the same folder at which it makes the file or folder; that is moved into place when it is
    whole. So `path` is either absent or complete, whichever process dies when. Of several processes that need it one
    builds and the others wait. The next process removes what a killed one left; damaged files are named on standard
    error and rebuilt.
    """
    if whole(path):
        return path
    with locked(path):
        if not whole(path):
            say_damage(path)
            part = path.parent / f".{path.name}.part"
            _remove(part)
            build(part)
            put(part, path)
    return path


def whole(path: Path) -> bool:
    """Whether `path` is there and is what `put` put there."""
    return path.exists() and damage(path, _sums(path)) is None


def say_damage(path: Path) -> None:
    """Names what is there, but is not what was written."""
    if path.exists() and (why := damage(path, _sums(path))):
        said = f"{path} in the cache is damaged, or an earlier version's ({why}): it is made anew"
        print(harmless(said), file=sys.stderr)


def put(part: Path, path: Path) -> None:
    """Moves a file or folder that is complete from `part` to `path`, in the place of one that is damaged."""
    write_sums(part, _sums(path))
    old = path.parent / f".{path.name}.old"
    _remove(old)
    if path.is_dir():
        os.replace(path, old)
    os.replace(part, path)
    sync(path.parent)
    remember([path] if path.is_file() else (file for file in path.rglob("*") if file.is_file()), _sums(path))
    _remove(old)


def adopt(path: Path) -> None:
    """Takes what an earlier version put there and whose bytes are known to be right by other means."""
    write_sums(path, _sums(path))


def listed(path: Path) -> bool:
    """Whether sizes and hashes of `path` were written; an earlier version wrote none."""
    return _sums(path).exists()


def _sums(path: Path) -> Path:
    return path.parent / f".{path.name}.sums"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
