"""Opens well-known small corpora as sources, read in place from the folder `$TWINSTACK_SHARED_DATA`.

All of them fit in memory: a split is read and parsed once. Archives are not unpacked to disk.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from common.data.cache import build_once, default_cache_dir
from common.data.corpora.table import CORPORA
from common.data.sources.files import parse_split, slice_bounds
from common.data.sources.packed_files import UNPACKERS, UNPACKING_ERRORS
from common.data.sources.records import Problem, Record
from common.errors import UserError, nearest
from common.paths import user_path
from common.progress import spinner

FOLDER_VARIABLE = "TWINSTACK_SHARED_DATA"
PARSER_VERSION = 1
"""Part of every content id: raise it with any change of what parsers return or how splits are made."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CorpusSource:
    """A split of a corpus, in memory."""

    content_id: str
    records: Sequence[Record]
    """Records whose fields are named as in the corpus."""
    fields: dict[str, str]
    """Our name of a field -> its name in the corpus."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        record = self.records[index]
        return {ours: record[theirs] for ours, theirs in self.fields.items()}

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        """Returns several records; none is a Problem, since all have been parsed."""
        return [self[index] for index in indices]


def open_corpus(name: str, split: str, fields: dict[str, str]) -> CorpusSource:
    """Opens one split of a corpus, or a slice of one.

    Args:
      name: a key of `CORPORA`, for example "multi30k" or "scan/length".
      split: for example "train" or "validation[:10%]".
      fields: our name of a field -> its name in the corpus.

    Raises UserError for an unknown corpus, split or field, and for a file that is missing or cannot be read.
    """
    if name not in CORPORA:
        raise UserError(f"there is no corpus:{name}; {nearest(name, CORPORA)}")
    corpus = CORPORA[name]
    base, start, stop = parse_split(split)
    if base not in corpus.splits:
        raise UserError(f"corpus:{name} has no split {base!r}; {nearest(base, corpus.splits)}")
    paths = {file: _corpus_file(name, file) for file in corpus.splits[base]}
    stamps = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths.values())
    records, digest = _split_records(name, base, stamps)
    known = records[0] if records else corpus.fields
    for ours, theirs in fields.items():
        if theirs not in known:
            raise UserError(f"source.{ours}: corpus:{name} {base} has no field {theirs!r}; {nearest(theirs, known)}")
    low, high = slice_bounds(start, stop, len(records))
    fields_read = ",".join(f"{ours}={theirs}" for ours, theirs in fields.items() if ours != "group")
    content_id = f"corpus:{name}:{split}:{fields_read}:blake2b-{digest}-parser-{PARSER_VERSION}"
    return CorpusSource(content_id=content_id, records=records[low:high], fields=fields)


def data_folder() -> Path:
    """Returns the folder `$TWINSTACK_SHARED_DATA`. Raises UserError if it is not set."""
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        raise UserError(f"{FOLDER_VARIABLE} is not set; set it to the folder of corpora")
    return user_path(named)


def _corpus_file(name: str, file: str) -> Path:
    path = data_folder() / file.partition("!")[0]
    if not path.is_file():
        raise UserError(f"corpus:{name}: there is no file {path}; set {FOLDER_VARIABLE} to the folder of corpora")
    return path


@functools.lru_cache(maxsize=16)
def _split_records(name: str, split: str, stamps: tuple[tuple[Path, int, int], ...]) -> tuple[list[Record], str]:
    """Returns a split's records, and a hash of the files and the division they come from.

    `stamps` are (path, size, modification time) of the split's files, so that a changed file misses the cache.
    """
    records, digest = _parse_files(name, CORPORA[name].splits[split], stamps)
    if (divide := CORPORA[name].divide) is None:
        return records, digest

    def write(part: Path) -> None:
        with spinner(f"splitting corpus:{name} by its source texts"):
            part.write_text(json.dumps(divide(records)))

    # Cached, since dividing may take longer than reading.
    key = f"{name.replace('/', '-')}-{digest}-parser-{PARSER_VERSION}.json"
    text = build_once(default_cache_dir() / "corpora" / key, write).read_text()
    divided = hashlib.blake2b(f"{digest} {text}".encode(), digest_size=16).hexdigest()
    return [record for record, its_split in zip(records, json.loads(text), strict=True) if its_split == split], divided


@functools.lru_cache(maxsize=4)
def _parse_files(name: str, files: tuple[str, ...], stamps: tuple) -> tuple[list[Record], str]:
    """Returns all records of some files of a corpus, and a hash of the files' bytes as stored."""
    digest, contents = hashlib.blake2b(digest_size=16), []
    for file, (path, _, _) in zip(files, stamps, strict=True):
        packed = path.read_bytes()
        digest.update(len(packed).to_bytes(8, "little") + packed)
        try:
            contents.append(_file_content(packed, path.suffix, file.partition("!")[2]))
        except (*UNPACKING_ERRORS, ValueError, tarfile.TarError, KeyError) as error:
            raise UserError(f"corpus:{name}: {path} cannot be unpacked ({error})") from error
    try:
        return CORPORA[name].parse(contents, CORPORA[name].fields), digest.hexdigest()
    except ValueError as error:  # a UnicodeDecodeError is a ValueError
        shown = ", ".join(str(path) for path, _, _ in stamps)
        raise UserError(f"corpus:{name}: {shown} cannot be read: {error}") from error


def _file_content(packed: bytes, suffix: str, member: str) -> bytes:
    """Returns the content of a compressed file, or of a member of a compressed tar archive."""
    content = b"".join(UNPACKERS[suffix](io.BytesIO(packed)))
    if not member:
        return content
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        file = archive.extractfile(member)
        if file is None:
            raise ValueError(f"{member} is not a file")
        return file.read()
