"""A shard of a tokenised source: which records it holds, and the one call that writes it, wherever it runs."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.data.sources.records import Problem, Record, Source, in_batches
from common.data.sums import file_hash, sync
from common.data.tokenized.token_store import KEPT, ShardWriter
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from common.files import read_json, write_json

FORMAT = 3
"""Part of the cache's key: raise it with any change of what is stored."""
RECORDS_AT_ONCE = 512
THREADS = 2
"""Batches that are tokenised at a time: that is C++ or Rust, beside which Python reads and writes."""
MOST_SHARDS = 256
REPORT = "{number:05d}.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardTask:
    """What to tokenise, and how; can be sent to other processes."""

    source: Source
    fields: tuple[str, ...]
    tokenizer: Tokenizer
    end_each: bool
    """An eos behind every record."""
    strict: bool
    """Stop at the first record that cannot be used."""
    records_a_shard: int = 1 << 14
    """More where there would be too many shards."""

    @property
    def shown(self) -> str:
        """The source, for messages."""
        return self.source.content_id.partition(":blake2b")[0]

    def key(self) -> str:
        """Names what is made: equal keys, equal bytes."""
        return hashlib.blake2b(json.dumps(self.identity()).encode(), digest_size=16).hexdigest()

    def identity(self) -> list[object]:
        """As `IDENTITY` names it."""
        return [FORMAT, self.source.content_id, self.tokenizer.content_hash, list(self.fields), self.end_each]

    def shards(self) -> int:
        return max(1, min(MOST_SHARDS, -(-len(self.source) // self.records_a_shard)))

    def records(self, number: int) -> range:
        """Of shard `number`."""
        total, shards = len(self.source), self.shards()
        return range(number * total // shards, (number + 1) * total // shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardReport:
    records: int
    """Read."""
    kept: int
    empty: int
    """Kept, with no token in any field."""
    tokens: dict[str, int]
    """Of each field."""
    problems: list[str]
    """One for each record that was left out."""
    hashes: dict[str, str]
    """File name -> BLAKE2b of its bytes."""
    bytes: int
    """Of these files."""


def write_shard(
    number: int, task: ShardTask, folder: Path, tick: Callable[[int], None] = lambda done: None
) -> ShardReport:
    """Tokenises shard `number` into `folder`, unless its report and the files that it lists are already there.

    The report is written last, so a shard without one is begun anew. `tick` hears of every batch of records.
    """
    path = folder / REPORT.format(number=number)
    if (there := _finished(path)) is not None:
        tick(there.records)
        return there
    writers = {field: ShardWriter(folder, number, field, task.tokenizer.vocab_size) for field in task.fields}
    kept: list[Sequence[int]] = []
    problems: list[str] = []
    empty = 0
    indices = task.records(number)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as ahead:
        for made in _in_turn(ahead, task, indices):
            problems += made.problems
            kept.append(made.kept)
            lengths = [writer.append(made.ids[field]) for field, writer in writers.items()]
            empty += int(np.count_nonzero(sum(lengths) == 0))
            tick(len(made.kept) + len(made.problems))
    tokens = {field: writer.close() for field, writer in writers.items()}
    if problems:
        np.save(folder / KEPT.format(number=number), np.concatenate(kept).astype(np.int64) - indices.start)
    files = sorted(folder.glob(f"{number:05d}.*.npy"))
    for file in files:
        sync(file)
    report = ShardReport(
        records=len(indices),
        kept=sum(map(len, kept)),
        empty=empty,
        tokens=tokens,
        problems=problems,
        hashes={file.name: file_hash(file) for file in files},
        bytes=sum(file.stat().st_size for file in files),
    )
    write_json(path, dataclasses.asdict(report))
    return report


def _finished(path: Path) -> ShardReport | None:
    """The report of a shard that an earlier process wrote; None where not all of it is there."""
    if not path.exists():
        return None
    try:
        report = ShardReport(**read_json(path))
        right = all(file_hash(path.parent / name) == digest for name, digest in report.hashes.items())
    except (OSError, UserError, TypeError, AttributeError):
        return None
    return report if right else None


class _Encoded(NamedTuple):
    """A batch of records."""

    kept: Sequence[int]
    """Their numbers, but for those that cannot be used."""
    problems: list[str]
    ids: dict[str, list[np.ndarray]]
    """By field."""


def _in_turn(ahead: concurrent.futures.Executor, task: ShardTask, indices: range) -> Iterator[_Encoded]:
    """What `_encode` makes of each batch, the next ones being made meanwhile."""
    waiting: collections.deque[concurrent.futures.Future[_Encoded]] = collections.deque()
    begin = indices.start
    for found in in_batches(task.source, indices, RECORDS_AT_ONCE):
        waiting.append(ahead.submit(_encode, task, range(begin, begin + len(found)), found))
        begin += len(found)
        if len(waiting) > THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode(task: ShardTask, indices: range, found: list[Record | Problem]) -> _Encoded:
    """A strict task ends at the first record that cannot be used."""
    try:
        ids = _ids(task, found)
    except (TypeError, UserError):  # a Problem has no fields; or a text is not valid Unicode
        found = [_checked(task, record, index) for record, index in zip(found, indices, strict=True)]
        ids = _ids(task, [record for record in found if not isinstance(record, Problem)])
    problems = [str(record) for record in found if isinstance(record, Problem)]
    if problems and task.strict:
        raise UserError(problems[0])
    usable = zip(indices, found, strict=True)
    kept = [i for i, record in usable if not isinstance(record, Problem)] if problems else indices
    return _Encoded(kept=kept, problems=problems, ids=ids)


def _ids(task: ShardTask, records: Sequence[Any]) -> dict[str, list[np.ndarray]]:
    ids = {field: task.tokenizer.encode_batch([record[field] for record in records]) for field in task.fields}
    if task.end_each:
        end = np.array([task.tokenizer.eos_id], np.int32)
        ids = {field: [np.concatenate([a, end]) for a in arrays] for field, arrays in ids.items()}
    return ids


def _checked(task: ShardTask, record: Record | Problem, index: int) -> Record | Problem:
    """The record, or what is wrong with it."""
    if isinstance(record, Problem):
        return record
    for field in task.fields:
        try:
            record[field].encode()
        except UnicodeEncodeError:
            return Problem(f"{task.shown} record {index}", f"field {field!r} is not valid Unicode (a lone surrogate)")
    return record
