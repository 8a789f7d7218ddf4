"""The cache: one folder for everything that can be rebuilt. An entry is built once and checked before use."""

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
    """Returns `$TWINSTACK_CACHE`, or else the folder `twinstack` where the platform keeps caches."""
    if named := os.environ.get("TWINSTACK_CACHE"):
        return user_path(named, "$TWINSTACK_CACHE")
    if sys.platform == "darwin":
        return user_path("~") / "Library" / "Caches" / "twinstack"
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "twinstack"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock on `path` that excludes other processes; the system releases it if its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(harmless(f"waiting for another process that is making {path}"), file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Builds the file or folder `path` unless it is there and undamaged, and returns `path`.

    `build` makes the file or folder at a temporary path in the same folder, which is then renamed. So `path` is either
    absent or complete, whenever a process dies. If several processes need it, one builds and the others wait. The next
    process removes what a killed one left. Damaged entries are named on standard error and rebuilt.
    """
    if whole(path):
        return path
    with locked(path):
        if not whole(path):
            warn_of_damage(path)
            part = path.parent / f".{path.name}.part"
            _remove(part)
            build(part)
            put(part, path)
    return path


def whole(path: Path) -> bool:
    """Returns whether `path` is there with the contents that `put` recorded."""
    return path.exists() and damage(path, _sums(path)) is None


def warn_of_damage(path: Path) -> None:
    """Prints a warning if `path` is there with other contents than were recorded."""
    if path.exists() and (why := damage(path, _sums(path))):
        warning = f"{path} in the cache is damaged, or from an earlier version ({why}): it is rebuilt"
        print(harmless(warning), file=sys.stderr)


def put(part: Path, path: Path) -> None:
    """Moves a complete file or folder from `part` to `path`, replacing a damaged one, and records its hashes."""
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
    """Records the hashes of an entry of an earlier version, whose contents the caller has checked otherwise."""
    write_sums(path, _sums(path))


def listed(path: Path) -> bool:
    """Returns whether the hashes of `path` are recorded; earlier versions recorded none."""
    return _sums(path).exists()


def _sums(path: Path) -> Path:
    return path.parent / f".{path.name}.sums"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
