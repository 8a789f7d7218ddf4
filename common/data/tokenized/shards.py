"""Shards of a tokenised source: which records each holds, and the one function that writes one, wherever it runs."""

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
"""Part of the cache's key: raise it with any change to what is stored."""
RECORDS_AT_ONCE = 512
THREADS = 2
"""Batches that are tokenised at a time. Tokenising is C++ or Rust, and Python reads and writes meanwhile."""
MOST_SHARDS = 256
REPORT = "{shard:05d}.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardTask:
    """A source to tokenise shard by shard. Processes can send it to each other."""

    source: Source
    fields: tuple[str, ...]
    tokenizer: Tokenizer
    end_each: bool
    """Append eos to every record."""
    strict: bool
    """Raise an error at the first record that cannot be used."""
    records_a_shard: int = 1 << 14
    """The fewest records in a shard of a large source, which has at most `MOST_SHARDS`."""

    @property
    def shown(self) -> str:
        """Names the source in messages."""
        return self.source.content_id.partition(":blake2b")[0]

    def key(self) -> str:
        """Returns the hash of everything that determines the shards' bytes."""
        return hashlib.blake2b(json.dumps(self.identity()).encode(), digest_size=16).hexdigest()

    def identity(self) -> list[object]:
        """Returns everything that determines the shards' bytes; `prepared.IDENTITY` names the fields."""
        return [FORMAT, self.source.content_id, self.tokenizer.content_hash, list(self.fields), self.end_each]

    def shards(self) -> int:
        """Returns the number of shards."""
        return max(1, min(MOST_SHARDS, -(-len(self.source) // self.records_a_shard)))

    def records(self, shard: int) -> range:
        """Returns the source's records that one shard holds."""
        total, shards = len(self.source), self.shards()
        return range(shard * total // shards, (shard + 1) * total // shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What one shard holds."""

    records: int
    """Records read."""
    kept: int
    """Records that could be used."""
    empty: int
    """Kept records with no token in any field."""
    tokens: dict[str, int]
    """Tokens of each field."""
    problems: list[str]
    """One message for each skipped record."""
    hashes: dict[str, str]
    """File name -> BLAKE2b of its bytes."""
    bytes: int
    """Size of these files."""


def write_shard(
    shard: int, task: ShardTask, folder: Path, tick: Callable[[int], None] = lambda done: None
) -> ShardReport:
    """Tokenises one shard into `folder`, unless its report and the files that the report lists are already there.

    The report is written last, so a shard without one is begun anew. `tick` is called with the count of every batch of
    records.
    """
    path = folder / REPORT.format(shard=shard)
    if (finished := _finished_report(path)) is not None:
        tick(finished.records)
        return finished
    writers = {field: ShardWriter(folder, shard, field, task.tokenizer.vocab_size) for field in task.fields}
    kept: list[Sequence[int]] = []
    problems: list[str] = []
    empty = 0
    records = task.records(shard)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for batch in _encoded_batches(pool, task, records):
            problems += batch.problems
            kept.append(batch.kept)
            lengths = [writer.append(batch.ids[field]) for field, writer in writers.items()]
            empty += int(np.count_nonzero(sum(lengths) == 0))
            tick(len(batch.kept) + len(batch.problems))
    tokens = {field: writer.close() for field, writer in writers.items()}
    if problems:
        np.save(folder / KEPT.format(shard=shard), np.concatenate(kept).astype(np.int64) - records.start)
    files = sorted(folder.glob(f"{shard:05d}.*.npy"))
    for file in files:
        sync(file)
    report = ShardReport(
        records=len(records),
        kept=sum(map(len, kept)),
        empty=empty,
        tokens=tokens,
        problems=problems,
        hashes={file.name: file_hash(file) for file in files},
        bytes=sum(file.stat().st_size for file in files),
    )
    write_json(path, dataclasses.asdict(report))
    return report


def _finished_report(path: Path) -> ShardReport | None:
    """Reads the report of a shard that an earlier process wrote; None unless the whole shard is there."""
    if not path.exists():
        return None
    try:
        report = ShardReport(**read_json(path))
        intact = all(file_hash(path.parent / name) == digest for name, digest in report.hashes.items())
    except (OSError, UserError, TypeError, AttributeError):
        return None
    return report if intact else None


class _Encoded(NamedTuple):
    """A tokenised batch of records."""

    kept: Sequence[int]
    """The source's records that can be used."""
    problems: list[str]
    """One message for each of the others."""
    ids: dict[str, list[np.ndarray]]
    """Field -> the ids of each kept record."""


def _encoded_batches(pool: concurrent.futures.Executor, task: ShardTask, records: range) -> Iterator[_Encoded]:
    """Yields each batch of records, tokenised, in order; `pool` tokenises the next ones meanwhile."""
    waiting: collections.deque[concurrent.futures.Future[_Encoded]] = collections.deque()
    begin = records.start
    for found in in_batches(task.source, records, RECORDS_AT_ONCE):
        waiting.append(pool.submit(_encode, task, range(begin, begin + len(found)), found))
        begin += len(found)
        if len(waiting) > THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _encode(task: ShardTask, records: range, found: list[Record | Problem]) -> _Encoded:
    """Tokenises `found`, the contents of `records`. Raises UserError for one that a strict task cannot use."""
    try:
        ids = _ids(task, found)
    except (TypeError, UserError):  # a Problem has no fields; or a text is not valid Unicode
        found = [_checked(task, content, record) for content, record in zip(found, records, strict=True)]
        ids = _ids(task, [content for content in found if not isinstance(content, Problem)])
    problems = [str(content) for content in found if isinstance(content, Problem)]
    if problems and task.strict:
        raise UserError(problems[0])
    both = zip(records, found, strict=True)
    kept = [record for record, content in both if not isinstance(content, Problem)] if problems else records
    return _Encoded(kept=kept, problems=problems, ids=ids)


def _ids(task: ShardTask, records: Sequence[Any]) -> dict[str, list[np.ndarray]]:
    """Tokenises each field of the records, with eos if the task appends it."""
    ids = {field: task.tokenizer.encode_batch([record[field] for record in records]) for field in task.fields}
    if task.end_each:
        end = np.array([task.tokenizer.eos_id], np.int32)
        ids = {field: [np.concatenate([a, end]) for a in arrays] for field, arrays in ids.items()}
    return ids


def _checked(task: ShardTask, content: Record | Problem, record: int) -> Record | Problem:
    """Returns `content`, or a Problem if a text in it is not valid Unicode."""
    if isinstance(content, Problem):
        return content
    for field in task.fields:
        try:
            content[field].encode()
        except UnicodeEncodeError:
            return Problem(f"{task.shown} record {record}", f"field {field!r} is not valid Unicode (a lone surrogate)")
    return content
