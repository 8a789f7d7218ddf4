"""All examples of one split, tokenised once and memory mapped: lengths at once, any example by its index.

Legend: E examples, P tokens of all examples in a row, I and T an example's input and target tokens.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data import objectives
from common.data.cache import build_once
from common.data.config import DataConfig
from common.data.mixing import Mixing
from common.data.objective_config import CausalLM, Mixture, Part, Single, Supervised, needs_of
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
        objective: Single,
        seed: int,
        tokenizer: objectives.SpecialIds,
        source_content_id: str,
        mode: Sequence[int] = (),
    ) -> None:
        """`records` holds the token ids of every field that the objective reads; `mode` stands before all inputs."""
        self._mode_M = np.array(mode, np.int32)
        self._records = {field: records[field] for field in objectives.fields(objective)}
        self._objective = objective
        self._seed = seed
        self.tokenizer = tokenizer
        lengths = {field: ragged.lengths for field, ragged in self._records.items()}
        input_lengths, self.target_lengths = objectives.example_lengths(objective, lengths, seed=seed, ids=tokenizer)
        """int64 [E], as the following."""
        self.input_lengths = input_lengths + len(mode)
        identity: dict[str, Any] = {
            "source": source_content_id,
            "tokenizer": tokenizer.content_hash,
            "objective": dataclasses.asdict(objective),
        }
        if len(mode):
            identity["mode"] = list(mode)
        self.content = json.dumps(identity, sort_keys=True)
        """What the examples are: source, tokenizer and objective. Fingerprints are seeded with it."""

    def __len__(self) -> int:
        return len(self.input_lengths)

    def example(self, i: int) -> Example:
        """Example `i`, before packing."""
        tokens = {field: ragged[i] for field, ragged in self._records.items()}
        made = objectives.make_example(self._objective, seed=self._seed, index=i, tokens=tokens, ids=self.tokenizer)
        if not len(self._mode_M):
            return made
        return dataclasses.replace(made, inputs_I=np.concatenate([self._mode_M, made.inputs_I]))


class MixedExamples:
    """Several objectives' examples, mixed by rate; it ends where the first of them does.

    Its members are those of `Examples`.
    """

    def __init__(self, parts: Sequence[Examples], rates: Sequence[float], seed: int) -> None:
        mixing = Mixing(rates=tuple(rates), seed=seed)
        self._parts, self.tokenizer = parts, parts[0].tokenizer
        self._part_E, self._number_E = mixing.take(0, mixing.most([len(part) for part in parts]))
        self.input_lengths, self.target_lengths = np.zeros_like(self._part_E), np.zeros_like(self._part_E)
        for part, examples in enumerate(parts):
            (members,) = np.nonzero(self._part_E == part)
            self.input_lengths[members] = examples.input_lengths[self._number_E[members]]
            self.target_lengths[members] = examples.target_lengths[self._number_E[members]]
        self.content = json.dumps({"parts": [part.content for part in parts], "rates": list(rates)})

    def __len__(self) -> int:
        return len(self._part_E)

    def example(self, i: int) -> Example:
        return self._parts[self._part_E[i]].example(int(self._number_E[i]))


AnyExamples = Examples | MixedExamples


def open_examples(config: DataConfig, source: Source, tokenizer: Tokenizer, cache_dir: Path) -> AnyExamples:
    """The examples of one split: tokenised and stored on first use, memory mapped afterwards.

    Raises UserError for text that is not valid Unicode, and for a tokenizer with too few sentinels.
    """
    fields = ("inputs", "targets") if isinstance(config.objective, Supervised) else ("text",)
    identity = [FORMAT, source.content_id, tokenizer.content_hash, fields]
    key = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()

    def build(folder: Path) -> None:
        folder.mkdir()
        tokenize(source, fields, tokenizer, folder)
        (folder / "identity.json").write_text(json.dumps(identity, indent=1))

    config.check_sentinels(tokenizer.sentinels)
    folder = build_once(cache_dir / "tokenized" / key, build)
    records = {field: load_ragged(folder, field) for field in fields}
    match config.objective:
        case Mixture(parts=parts):
            made = [_in_pieces(config, records["text"], part, n, source, tokenizer) for n, part in enumerate(parts)]
            return MixedExamples(made, [part.rate for part in parts], config.seed)
        case Supervised() | CausalLM() as objective:
            return Examples(
                records,
                objective=objective,
                seed=config.seed,
                tokenizer=tokenizer,
                source_content_id=source.content_id,
            )
        case objective:
            return _in_pieces(config, records["text"], Part(objective=objective), 0, source, tokenizer)


def _in_pieces(
    config: DataConfig, text: Ragged, part: Part, number: int, source: Source, tokenizer: Tokenizer
) -> Examples:
    """Part `number` of a mixture, or the whole of an objective over raw text."""
    mode = tokenizer.encode(part.mode).tolist()
    # A mode takes input slots from the piece, so that what fitted may fit no more.
    left = dataclasses.replace(config, objective=part.objective, input_length=config.input_length - len(mode))
    piece = needs_of(part.objective, left.input_length, left.target_length).piece
    return Examples(
        {"text": objectives.cut_pieces(text, piece)},
        objective=part.objective,
        seed=config.seed + (number << 32),  # parts draw apart
        tokenizer=tokenizer,
        source_content_id=f"{source.content_id} in {piece}s",
        mode=mode,
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
