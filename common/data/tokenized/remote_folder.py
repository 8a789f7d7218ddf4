"""A folder at a URL: fetches its files when they are needed, and sends files to it."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.data.cache import build_once
from common.data.sources.files import file_system, reading
from common.data.sources.records import first_line
from common.data.sums import file_hash
from common.errors import UserError
from common.json_text import parse_json

_fetching: dict[Path, threading.Lock] = {}
"""A lock for each file that a thread fetches: `build_once` alone would print that another process is at work."""


class RemoteFolder(NamedTuple):
    """A folder of any file system that fsspec knows. Processes can send it to each other."""

    url: str

    def __str__(self) -> str:
        return self.url

    def at(self, name: str) -> str:
        """Returns the URL of a file."""
        return f"{self.url.rstrip('/')}/{name}"

    def read_json(self, name: str) -> Any | None:
        """Reads a JSON file; None if there is none. Raises UserError for a file that is not JSON."""
        with reading(self.at(name)):
            try:
                return parse_json(file_system(self.url).cat_file(self.at(name)))
            except FileNotFoundError:
                return None

    def fetched(self, name: str, digest: str, folder: Path) -> Path:
        """Returns the path of a file in the local `folder`, after fetching it if necessary.

        The path contains the digest, so two versions of a file do not collide. Raises UserError if the file cannot be
        fetched, or its BLAKE2b is not `digest`.
        """
        path = folder / f"{digest}.{name}"
        with _fetching.setdefault(path, threading.Lock()):
            return build_once(path, lambda part: self._fetch(name, digest, part))

    def send(self, path: Path) -> None:
        """Copies a local file there, under its own name. A killed process may leave half of it."""
        with _writing(self.at(path.name)):
            file_system(self.url).put_file(str(path), self.at(path.name))

    def send_json(self, name: str, value: Any) -> None:
        """Writes a JSON file there, whole or not at all."""
        system, part = file_system(self.url), self.at(f".{name}.part")
        with _writing(self.at(name)):
            system.pipe_file(part, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
            system.mv(part, self.at(name))

    def make(self) -> None:
        """Makes the folder, if the file system has folders; a bucket has none."""
        with _writing(self.url):
            file_system(self.url).makedirs(self.url, exist_ok=True)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        with _writing(self.at(name)), contextlib.suppress(FileNotFoundError):
            file_system(self.url).rm_file(self.at(name))

    def _fetch(self, name: str, digest: str, part: Path) -> None:
        with reading(self.at(name)):
            file_system(self.url).get_file(self.at(name), str(part))
        if file_hash(part) != digest:
            part.unlink()
            raise UserError(
                f"{self.at(name)} is damaged: its manifest has another hash; delete the folder and prepare it anew"
            )


@contextlib.contextmanager
def _writing(url: str) -> Iterator[None]:
    """Turns any error while `url` is written into a UserError, as `reading` does for reads."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{url} cannot be written: {first_line(error)}") from error
