"""A tokenised source that lies ready, in a folder or at an url: its manifest, and its files when they are needed."""

import dataclasses
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
"""Fields of a manifest that say what was tokenised, and how."""
VARIABLE = "TWINSTACK_PREPARED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A tokenised source."""

    where: Path | RemoteFolder
    """The folder, for messages."""
    place: Callable[[str], Path]
    """Where a file of that name lies on this machine; fetches it first where it is elsewhere."""
    fields: dict[str, TokenStream]
    manifest: dict

    @classmethod
    def open(cls, folder: Path, stamps: Path | None = None) -> "Prepared":
        """Reads where it lies. Raises UserError for a file that is missing.

        Args:
          stamps: a folder that keeps which files were found right; each is compared with its hash before it is first
            read. None: whoever opens it has done so.
        """
        manifest = read_json(folder / MANIFEST)
        missing = [name for name in _hashes(manifest, str(folder / MANIFEST)) if not (folder / name).exists()]
        if missing:
            raise UserError(
                f"{folder / missing[0]} is missing, which {MANIFEST} tells of; delete the folder and prepare it anew"
            )
        place = folder.joinpath if stamps is None else _checking(folder, manifest, stamps)
        return cls(where=folder, place=place, fields=_streams(manifest, place), manifest=manifest)

    @classmethod
    def remote(cls, remote: RemoteFolder, manifest: dict, fetched: Path) -> "Prepared":
        """Files come one by one into the folder `fetched`, when they are first read."""
        hashes = _hashes(manifest, remote.at(MANIFEST))

        def place(name: str) -> Path:
            return remote.fetched(name, hashes[name], fetched)

        return cls(where=remote, place=place, fields=_streams(manifest, place), manifest=manifest)

    def source_index(self, record: int) -> int:
        """The number that a record has in the source, where some were left out."""
        begin, first = 0, 0
        for number, shard in enumerate(self.manifest["shards"]):
            if record < first + shard["kept"]:
                if shard["kept"] == shard["records"]:
                    return begin + record - first
                kept = np.load(self.place(KEPT.format(number=number)), allow_pickle=False)
                return begin + int(kept[record - first])
            begin, first = begin + shard["records"], first + shard["kept"]
        raise IndexError(f"record {record} of {first}")


def find_elsewhere(key: str, identity: Sequence[object], cache_dir: Path) -> Prepared | None:
    """What lies under `$TWINSTACK_PREPARED`, a folder or an url, in the folder `key`; None where nothing does.

    Args:
      identity: what the manifest must say of itself.
      cache_dir: where the files of an url are fetched to.

    Raises UserError where the folder is missing, or holds something else.
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
    """Whether a folder's files are those that its manifest records."""
    try:
        hashes = _hashes(read_json(folder / MANIFEST), str(folder / MANIFEST))
        return all(file_hash(folder / name) == digest for name, digest in hashes.items())
    except (OSError, UserError, AttributeError, KeyError, TypeError):
        return False


def _checking(folder: Path, manifest: dict, stamps: Path) -> Callable[[str], Path]:
    hashes = _hashes(manifest, str(folder / MANIFEST))

    def place(name: str) -> Path:
        if name not in hashes or not is_right(folder / name, hashes[name], stamps / name):
            raise UserError(f"{folder / name} is damaged: {MANIFEST} records other bytes; delete and prepare it anew")
        return folder / name

    return place


def _check(shown: str, manifest: Any, identity: Sequence[object]) -> None:
    try:
        found = [manifest[name] for name in IDENTITY]
        digests = list(_hashes(manifest, shown).values())
        _streams(manifest, Path)
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{shown} is damaged; delete its folder and prepare it anew") from None
    if found != list(identity):
        raise UserError(
            f"{shown} tells of another source, tokenizer or format than its folder says; delete that and prepare anew"
        )
    if not all(re.fullmatch("[0-9a-f]+", digest) for digest in digests):  # which become names of files
        raise UserError(f"{shown} is damaged; delete its folder and prepare it anew")


def _hashes(manifest: dict, shown: str) -> dict[str, str]:
    """File name -> BLAKE2b of its bytes. Raises UserError, beginning with `shown`, for a name that is a path."""
    pairs = [pair for shard in manifest["shards"] for pair in shard["hashes"].items()]
    return {plain_name(name, shown): digest for name, digest in pairs}


def _streams(manifest: dict, place: Callable[[str], Path]) -> dict[str, TokenStream]:
    return {
        field: TokenStream.open(place, field, [(shard["kept"], shard["tokens"][field]) for shard in manifest["shards"]])
        for field in manifest["fields"]
    }
