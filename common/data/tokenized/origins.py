"""Keeps the tokenizer and descriptions of the sources with prepared tokens, so that a run needs no source files.

The folder of prepared tokens also has `tokenizers/KEY.json`, with the tokenizer's own files, and for every split
`sources/KEY.json`: its content id, number of records and, if its texts are scored, the records. Keys are hashes of
configs, which a run has without any file.
"""

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import to_json
from common.data.cache import build_once
from common.data.config import TokenizerConfig
from common.data.sources.config import SourceConfig
from common.data.sources.records import Problem, Record, Source, SourceBase, check_range, in_batches
from common.data.tokenized.prepared import VARIABLE
from common.data.tokenized.remote_folder import RemoteFolder
from common.data.tokenizers.saved import load_saved, saved_files
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from common.files import plain_name
from common.paths import user_path

FORMAT = 1
RECORDS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class KeptSource(SourceBase):
    """A split whose files are not on this machine."""

    name: str
    content_id: str
    records: int
    texts: Sequence[Record | None] | None
    """The records, with None for one that cannot be used; None if only tokens were kept."""

    def __len__(self) -> int:
        return self.records

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        """Reads records. Raises UserError if only tokens were kept."""
        check_range(indices, len(self))
        if self.texts is None:
            raise UserError(
                f"{self.name}: its text is needed, but ${VARIABLE} has only its tokens, and its files are not "
                "on this machine; prepare it for this same study"
            )
        found = [self.texts[index] for index in indices]
        return [
            Problem(f"{self.content_id} record {index}", "it could not be used when tokens were prepared")
            if record is None
            else record
            for index, record in zip(indices, found, strict=True)
        ]


def keep_source(to: str, part: SourceConfig, split: str, source: Source, *, with_text: bool) -> None:
    """Writes the description of one split to `to`, a folder or URL. Texts in an earlier description are kept."""
    folder, name = _folder(to, "sources"), f"{_source_key(part, split)}.json"
    before = _read_description(folder, name)
    if before is not None and before["content_id"] == source.content_id and (before["texts"] or not with_text):
        return
    texts = _texts(source) if with_text else None
    description = {"content_id": source.content_id, "records": len(source), "texts": texts}
    folder.make()
    folder.send_json(name, {"hash": _hash(description), **description})


def keep_tokenizer(
    to: str, config: TokenizerConfig, content_id: str, modes: Sequence[str], tokenizer: Tokenizer
) -> None:
    """Writes the tokenizer's files to `to`, a folder or URL."""
    folder = _folder(to, "tokenizers")
    files = {name: base64.b64encode(content).decode() for name, content in saved_files(tokenizer).items()}
    folder.make()
    folder.send_json(f"{_tokenizer_key(config, content_id, modes)}.json", files)


def kept_source(part: SourceConfig, split: str, where: str | None = None) -> KeptSource | None:
    """Opens one split from its description in `where` (None: `$TWINSTACK_PREPARED`); None if there is none.

    Raises UserError for a damaged description.
    """
    if not (where := where or os.environ.get(VARIABLE)):
        return None
    description = _read_description(_folder(where, "sources"), f"{_source_key(part, split)}.json")
    return None if description is None else KeptSource(name=f"{part.name} {split}", **description)


def has_tokenizer(config: TokenizerConfig, modes: Sequence[str], where: str) -> bool:
    """Returns whether `where`, a folder or URL, has the tokenizer of a config that names a file."""
    assert config.path is not None
    return _folder(where, "tokenizers").read_json(f"{_tokenizer_key(config, '', modes)}.json") is not None


def kept_tokenizer(config: TokenizerConfig, content_id: str, modes: Sequence[str], cache_dir: Path) -> Tokenizer | None:
    """Opens the tokenizer of this config and training text from `$TWINSTACK_PREPARED`; None if it has none.

    Raises UserError for a damaged one.
    """
    if not (where := os.environ.get(VARIABLE)):
        return None
    folder, key = _folder(where, "tokenizers"), _tokenizer_key(config, content_id, modes)
    files = folder.read_json(f"{key}.json")
    if files is None:
        return None

    def build(part: Path) -> None:
        part.mkdir(parents=True)
        for name, content in contents.items():
            (part / name).write_bytes(content)

    shown = folder.at(f"{key}.json")
    try:
        contents = {plain_name(name, shown): base64.b64decode(text, validate=True) for name, text in files.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"{shown} is damaged; delete it and prepare the data anew") from None
    return load_saved(build_once(cache_dir / "prepared" / "tokenizers" / _hash(files), build))


def _read_description(folder: RemoteFolder, name: str) -> dict[str, Any] | None:
    """Reads the description of a split; None if there is none. Raises UserError for a damaged one."""
    found = folder.read_json(name)
    if found is None:
        return None
    if not isinstance(found, dict) or found.pop("hash", None) != _hash(found):
        raise UserError(f"{folder.at(name)} is damaged; delete it and prepare the data anew")
    return found


def _texts(source: Source) -> list[Record | None]:
    """Reads all records, with None for one that cannot be used."""
    batches = in_batches(source, range(len(source)), RECORDS_AT_ONCE)
    return [None if isinstance(record, Problem) else record for batch in batches for record in batch]


def _folder(base: str, name: str) -> RemoteFolder:
    """Opens the folder `name` in a local folder or URL."""
    url = base if "://" in base else f"file://{user_path(base, f'${VARIABLE}').absolute()}"
    return RemoteFolder(f"{url.rstrip('/')}/{name}")


def _source_key(part: SourceConfig, split: str) -> str:
    """Hashes the config fields that determine the records."""
    determining = dataclasses.replace(part, train_split="", validation_split="", strict=False)
    return _hash([FORMAT, to_json(determining), split])


def _tokenizer_key(config: TokenizerConfig, content_id: str, modes: Sequence[str]) -> str:
    """Hashes what determines a tokenizer; one loaded from a file does not depend on the training text."""
    return _hash([FORMAT, to_json(config), content_id if config.path is None else "", *modes])


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
