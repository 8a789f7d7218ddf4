"""Opens a tokenised source that is already complete, in a folder or at a URL. Files are read when they are needed."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.sums import file_hash, is_right
from common.data.tokenized.remote_folder import RemoteFolder
from common.data.tokenized.token_store import KEPT, TokenStream
from common.errors import UserError
from common.files import plain_name, read_json
from common.paths import user_path

MANIFEST, PROBLEMS = "manifest.json", "problems.jsonl"
IDENTITY = ("format", "source", "tokenizer", "fields", "eos_behind_every_record")
"""Fields of a manifest that identify what was tokenised, and how."""
VARIABLE = "TWINSTACK_PREPARED"
"""The environment variable that names a folder or URL with prepared data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A complete tokenised source."""

    where: Path | RemoteFolder
    """Its folder, for messages."""
    local_path: Callable[[str], Path]
    """Maps a file's name to its path on this machine, fetching the file if necessary."""
    fields: dict[str, TokenStream]
    manifest: dict
    _opened: dict[int, np.ndarray] = dataclasses.field(init=False, default_factory=dict, repr=False, compare=False)
    """The records that each shard kept, once needed."""

    @classmethod
    def open(cls, folder: Path, stamps: Path | None = None) -> "Prepared":
        """Opens a folder in place. Raises UserError for a missing file.

        Args:
          stamps: checks each file's hash before its first read, and records in this folder which files have passed.
            None: the caller has checked the hashes.
        """
        manifest = read_json(folder / MANIFEST)
        missing = [name for name in _hashes(manifest, str(folder / MANIFEST)) if not (folder / name).exists()]
        if missing:
            raise UserError(
                f"{folder / missing[0]} is missing, though {MANIFEST} lists it; delete the folder and prepare it anew"
            )
        local_path = folder.joinpath if stamps is None else _checked_paths(folder, manifest, stamps)
        return cls(where=folder, local_path=local_path, fields=_streams(manifest, local_path), manifest=manifest)

    @classmethod
    def remote(cls, remote: RemoteFolder, manifest: dict, fetched: Path) -> "Prepared":
        """Opens a folder at a URL. Each file is fetched into the folder `fetched` before its first read."""
        hashes = _hashes(manifest, remote.at(MANIFEST))

        def local_path(name: str) -> Path:
            return remote.fetched(name, hashes[name], fetched)

        return cls(where=remote, local_path=local_path, fields=_streams(manifest, local_path), manifest=manifest)

    def source_record(self, place: int) -> int:
        """Maps a place to the source's own record: records that cannot be used have no place."""
        return int(self.source_records(np.array([place]))[0])

    def source_records(self, place_E: np.ndarray) -> np.ndarray:
        """Maps each place to the source's own record, int64 [E]."""
        first_records, first_places = self._shard_starts
        if len(place_E) and not 0 <= place_E.min() <= place_E.max() < first_places[-1]:
            raise IndexError(f"places {place_E.min()} to {place_E.max()} of {first_places[-1]}")
        shard_E = np.searchsorted(first_places, place_E, side="right") - 1
        record_E = place_E - first_places[shard_E]
        for shard in np.unique(shard_E).tolist():
            if (kept := self._kept(shard)) is not None:
                members = shard_E == shard
                record_E[members] = kept[record_E[members]]
        return record_E + first_records[shard_E]

    @functools.cached_property
    def _shard_starts(self) -> tuple[np.ndarray, np.ndarray]:
        """The first record and the first place of each shard, then the number of both."""
        counts = [[0, *(shard[name] for shard in self.manifest["shards"])] for name in ("records", "kept")]
        records, places = np.cumsum(counts, axis=1)
        return records, places

    def _kept(self, shard: int) -> np.ndarray | None:
        """Returns which of a shard's records were kept; None for all."""
        if self.manifest["shards"][shard]["kept"] == self.manifest["shards"][shard]["records"]:
            return None
        if shard not in self._opened:
            path = self.local_path(KEPT.format(shard=shard))
            self._opened[shard] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._opened[shard]


def find_elsewhere(key: str, identity: Sequence[object], cache_dir: Path) -> Prepared | None:
    """Opens the folder `key` under `$TWINSTACK_PREPARED`, a folder or URL; None if there is none.

    Args:
      identity: the fields `IDENTITY` that the manifest must have.
      cache_dir: receives the files of a URL.

    Raises UserError if the folder that the variable names is missing, or the manifest has another identity.
    """
    base = os.environ.get(VARIABLE)
    if not base:
        return None
    if "://" in base:
        remote = RemoteFolder(f"{base.rstrip('/')}/{key}")
        manifest = remote.read_json(MANIFEST)
        if manifest is None:
            return None
        _check(remote.at(MANIFEST), manifest, identity)
        return Prepared.remote(remote, manifest, cache_dir / "prepared" / key)
    folder = user_path(base, f"${VARIABLE}")
    if not folder.is_dir():
        raise UserError(f"${VARIABLE} is {base}: no such folder")
    if not (folder / key).is_dir():
        return None
    _check(str(folder / key / MANIFEST), read_json(folder / key / MANIFEST), identity)
    return Prepared.open(folder / key, stamps=cache_dir / "prepared" / key)


def as_written(folder: Path) -> bool:
    """Returns whether a folder's files have the hashes that its manifest records."""
    try:
        hashes = _hashes(read_json(folder / MANIFEST), str(folder / MANIFEST))
        return all(file_hash(folder / name) == digest for name, digest in hashes.items())
    except (OSError, UserError, AttributeError, KeyError, TypeError):
        return False


def _checked_paths(folder: Path, manifest: dict, stamps: Path) -> Callable[[str], Path]:
    """Returns a function that maps a file's name to its path, after a check of its hash."""
    hashes = _hashes(manifest, str(folder / MANIFEST))

    def local_path(name: str) -> Path:
        if name not in hashes or not is_right(folder / name, hashes[name], stamps / name):
            raise UserError(f"{folder / name} is damaged: {MANIFEST} has another hash; delete and prepare it anew")
        return folder / name

    return local_path


def _check(shown: str, manifest: Any, identity: Sequence[object]) -> None:
    """Raises UserError, which begins with `shown`, for a manifest that is damaged or has another identity."""
    try:
        found = [manifest[name] for name in IDENTITY]
        digests = list(_hashes(manifest, shown).values())
        _streams(manifest, Path)
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{shown} is damaged; delete its folder and prepare it anew") from None
    if found != list(identity):
        raise UserError(
            f"{shown} is of another source, tokenizer or format than its folder's name; delete that and prepare it anew"
        )
    if not all(re.fullmatch("[0-9a-f]+", digest) for digest in digests):  # they become names of files
        raise UserError(f"{shown} is damaged; delete its folder and prepare it anew")


def _hashes(manifest: dict, shown: str) -> dict[str, str]:
    """Returns each file's BLAKE2b by name. Raises UserError, which begins with `shown`, for a name that is a path."""
    pairs = [pair for shard in manifest["shards"] for pair in shard["hashes"].items()]
    return {plain_name(name, shown): digest for name, digest in pairs}


def _streams(manifest: dict, local_path: Callable[[str], Path]) -> dict[str, TokenStream]:
    """Opens each field's tokens."""
    sizes = {
        field: [(shard["kept"], shard["tokens"][field]) for shard in manifest["shards"]] for field in manifest["fields"]
    }
    return {field: TokenStream.open(local_path, field, each) for field, each in sizes.items()}
