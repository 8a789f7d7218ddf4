"""The one folder for everything that can be rebuilt, and building a thing in it exactly once."""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from common.paths import user_path
from common.terminal import harmless


def default_cache_dir() -> Path:
    """`$TWINSTACK_CACHE`, or the folder `twinstack` in the platform's own place for caches."""
    if named := os.environ.get("TWINSTACK_CACHE"):
        return user_path(named)
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
    """Makes the file or folder `path` unless it is there, and returns it.

    `build` is given a path in the same folder at which it makes the file or folder; that is moved into place when it is
    whole. So `path` is either absent or complete, whichever process dies when. Of several processes that need it one
    builds and the others wait. What a killed process left behind is removed by the next.
    """
    if path.exists():
        return path
    with locked(path):
        if not path.exists():
            part = path.parent / f".{path.name}.part"
            if part.is_dir():
                shutil.rmtree(part)
            part.unlink(missing_ok=True)
            build(part)
            os.replace(part, path)
    return path
