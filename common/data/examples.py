"""All examples of one split, tokenised once and memory mapped: lengths at once, any example by its index.

Legend: E examples, P tokens of all examples in a row, I and T an example's input and target tokens.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.data import objectives
from common.data.cache import build_once
from common.data.config import DataConfig, Objective, RawText
from common.data.objectives import Example
from common.data.progress import bar
from common.data.ragged import Ragged
from common.data.sources import Source
from common.data.tokenizer import Tokenizer

FORMAT = 1
"""Part of the cache's key: raise it with any change of what is stored."""
RECORDS_AT_ONCE = 2048
TOKENS = "{field}.tokens.npy"
OFFSETS = "{field}.offsets.npy"


class Examples:
    """An objective over tokenised records. Every arm that reads the same `content` reads the same examples."""

    def __init__(
        self,
        records: Mapping[str, Ragged],
        *,
        objective: Objective,
        seed: int,
        tokenizer: objectives.SpecialIds,
        source_content_id: str,
    ) -> None:
        """`records` holds the token ids of every field that the objective reads."""
        self._records = {field: records[field] for field in objectives.fields(objective)}
        self._objective = objective
        self._seed = seed
        self.tokenizer = tokenizer
        lengths = {field: ragged.lengths for field, ragged in self._records.items()}
        self.input_lengths, self.target_lengths = objectives.example_lengths(
            objective, lengths, seed=seed, ids=tokenizer
        )
        """int64 [E] each."""
        identity = {
            "source": source_content_id,
            "tokenizer": tokenizer.content_hash,
            "objective": dataclasses.asdict(objective),
        }
        self.content = json.dumps(identity, sort_keys=True)
        """What the examples are: source, tokenizer and objective. Fingerprints are seeded with it."""

    def __len__(self) -> int:
        return len(self.input_lengths)

    def example(self, i: int) -> Example:
        """Example `i`, before packing."""
        tokens = {field: ragged[i] for field, ragged in self._records.items()}
        return objectives.make_example(self._objective, seed=self._seed, index=i, tokens=tokens, ids=self.tokenizer)


def open_examples(config: DataConfig, source: Source, tokenizer: Tokenizer, cache_dir: Path) -> Examples:
    """The examples of one split: tokenised and stored on first use, memory mapped afterwards.

    Raises UserError for text that is not valid Unicode, and for a tokenizer with too few sentinels.
    """
    fields = objectives.fields(config.objective)
    identity = [FORMAT, source.content_id, tokenizer.content_hash, fields]
    key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()

    def build(folder: Path) -> None:
        folder.mkdir()
        tokenize(source, fields, tokenizer, folder)
        (folder / "identity.json").write_text(json.dumps(identity, indent=1))

    config.check_sentinels(tokenizer.sentinels)
    folder = build_once(cache_dir / "tokenized" / key, build)
    records, content_id = {field: load_ragged(folder, field) for field in fields}, source.content_id
    if isinstance(config.objective, RawText):
        piece = config.needs(config.objective).piece
        records, content_id = {"text": objectives.cut_pieces(records["text"], piece)}, f"{content_id} in {piece}s"
    return Examples(
        records, objective=config.objective, seed=config.seed, tokenizer=tokenizer, source_content_id=content_id
    )


def tokenize(source: Source, fields: tuple[str, ...], tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the ids of all records' `fields` into `folder`, a batch of records in memory at a time."""
    starts = range(0, len(source), RECORDS_AT_ONCE)
    writers = {field: _TokenWriter(folder, field) for field in fields}
    for start in bar(starts, "tokenising"):
        records = source.__getitems__(range(start, min(start + RECORDS_AT_ONCE, len(source))))
        for field, writer in writers.items():
            writer.append(tokenizer.encode_batch([record[field] for record in records]))
    for writer in writers.values():
        writer.close()


def load_ragged(folder: Path, field: str) -> Ragged:
    """What `tokenize` wrote for one field; the tokens stay on disk until read."""
    tokens = np.load(folder / TOKENS.format(field=field), mmap_mode="r", allow_pickle=False)
    offsets = np.load(folder / OFFSETS.format(field=field), allow_pickle=False)
    return Ragged(tokens_P=np.asarray(tokens), offsets=offsets)  # a plain view slices faster than np.memmap does


class _TokenWriter:
    """Appends to a flat .npy file whose length is known only at the end."""

    def __init__(self, folder: Path, field: str) -> None:
        self._file = (folder / TOKENS.format(field=field)).open("wb")
        self._offsets_path = folder / OFFSETS.format(field=field)
        self._lengths: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._header(0)

    def append(self, arrays: list[np.ndarray]) -> None:
        self._lengths.append(np.array([len(a) for a in arrays], np.int64))
        self._file.write(np.concatenate(arrays).astype("<i4").tobytes())

    def close(self) -> None:
        offsets = np.cumsum(np.concatenate(self._lengths))
        np.save(self._offsets_path, offsets)
        size = self._file.tell()
        self._file.seek(0)
        self._header(int(offsets[-1]))
        self._file.close()
        # NumPy leaves room in a header for the first axis to grow; were that to end, the file would be torn.
        assert np.load(self._file.name, mmap_mode="r").nbytes + self._data_start == size

    def _header(self, length: int) -> None:
        fields = {"descr": "<i4", "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, fields)
        self._data_start = self._file.tell()
