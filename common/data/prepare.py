"""Tokenising a source into shards: over several processes, going on where a killed one stopped, with a manifest.

A shard is a range of records. It is written by one call of `write_shard`, which is the whole of the work wherever it
runs: in this process, in several, or in an Apache Beam pipeline (`common.data.prepare_beam`).
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from common.data.cache import locked
from common.data.prepared import IDENTITY, MANIFEST, PROBLEMS, VARIABLE, Prepared, find_elsewhere
from common.data.progress import counter
from common.data.records import Problem, Record, Source
from common.data.remote_folder import file_hash
from common.data.token_store import KEPT, ShardWriter
from common.data.tokenizer import Tokenizer
from common.errors import UserError
from common.files import read_json, write_json

FORMAT = 3
"""Part of the cache's key: raise it with any change of what is stored."""
RECORDS_AT_ONCE = 512
MOST_SHARDS = 256
REPORT = "{number:05d}.json"
NAMED = 3
"""Problems that a warning names; all are in the file."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
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


class Destination(Protocol):
    """Where a tokenised source is put: a folder here, or an url (`common.data.prepare_remote`).

    Objects can be sent to other processes.
    """

    def manifest(self) -> dict | None:
        """None unless all is there."""
        ...

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keeps others from making the same."""
        ...

    def write(self, number: int, job: Job, tick: Callable[[int], None]) -> ShardReport:
        """Puts shard `number` there, unless it is there already."""
        ...

    def finish(self, job: Job, reports: Sequence[ShardReport]) -> None:
        """Makes all shards into one whole."""
        ...


@dataclasses.dataclass(frozen=True)
class Folder:
    """On this machine; it appears when it is whole."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def manifest(self) -> dict | None:
        return read_json(self.path / MANIFEST) if self.path.exists() else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with locked(self.path):
            if (self._part / MANIFEST).exists():  # only the move was missing
                os.replace(self._part, self.path)
            yield

    def write(self, number: int, job: Job, tick: Callable[[int], None]) -> ShardReport:
        self._part.mkdir(parents=True, exist_ok=True)
        return write_shard(number, job, self._part, tick)

    def finish(self, job: Job, reports: Sequence[ShardReport]) -> None:
        finish(job, self._part, reports)
        os.replace(self._part, self.path)

    @property
    def _part(self) -> Path:
        return self.path.parent / f".{self.path.name}.part"


def open_tokenized(job: Job, cache_dir: Path, workers: int | None = None) -> Prepared:
    """The tokenised source: from the cache, from `$TWINSTACK_PREPARED`, or made now in the cache.

    Raises UserError for a record that cannot be used where the job is strict.
    """
    folder = cache_dir / "tokenized" / job.key()
    if not folder.exists():
        if prepared := find_elsewhere(job.key(), job.identity(), cache_dir):
            _check_strict(job, prepared.manifest)
            return prepared
        if elsewhere := os.environ.get(VARIABLE):
            _log.warning("%s is not in %s and is tokenised here; its key is %s", job.shown, elsewhere, job.key())
    make(job, Folder(folder), functools.partial(write_all, workers=workers))
    return Prepared.open(folder)


def prepare(job: Job, folder: Path, workers: int | None = None) -> Prepared:
    """The tokenised source in `folder`: as it lies there, or made now.

    Shards that a killed process finished are kept. Records that cannot be used are left out, counted and named in
    `problems.jsonl`, and a warning says so.

    Args:
      workers: processes; None: as many as there are cores, where there are several shards.

    Raises UserError for a record that cannot be used where the job is strict.
    """
    make(job, Folder(folder), functools.partial(write_all, workers=workers))
    prepared = Prepared.open(folder)
    warn_of_problems(job, prepared)
    return prepared


def make(job: Job, destination: Destination, write: Callable[[Job, Destination], Sequence[ShardReport]]) -> dict:
    """The manifest of what lies at the destination; what is not there yet is made by `write`, such as `write_all`.

    Raises UserError for a record that cannot be used where the job is strict.
    """
    manifest = destination.manifest()
    if manifest is None:
        with destination.alone():
            manifest = destination.manifest()
            if manifest is None:
                destination.finish(job, write(job, destination))
                manifest = destination.manifest()
    assert manifest is not None
    _check_strict(job, manifest)
    return manifest


def write_all(job: Job, destination: Destination, workers: int | None = None) -> list[ShardReport]:
    """Every shard, by so many processes on this machine; None: as many as there are cores."""
    shards = job.shards()
    workers = min(shards, workers or os.cpu_count() or 1)
    with counter("tokenising", len(job.source)) as tick:
        if workers == 1:
            return [destination.write(number, job, tick) for number in range(shards)]
        # Not by fork: a process with JAX's threads in it cannot be forked safely.
        context = multiprocessing.get_context("spawn")
        reports = []
        with concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (job, destination)) as pool:
            for report in pool.map(_in_worker, range(shards)):
                tick(report.records)
                reports.append(report)
        return reports


def warn_of_problems(job: Job, prepared: Prepared) -> None:
    """Where records were left out."""
    if problems := prepared.manifest["problems"]:
        _log.warning(
            "%d of %d records of %s cannot be used and are left out (source.strict=true stops instead): %s; all: %s",
            *(problems["count"], prepared.manifest["records"], job.shown),
            *("; ".join(problems["first"]), f"{prepared.where}/{PROBLEMS}"),
        )


def write_shard(number: int, job: Job, folder: Path, tick: Callable[[int], None] = lambda done: None) -> ShardReport:
    """Tokenises shard `number` into `folder`, unless its report lies there already.

    The report is written last, so a shard without one is begun anew. `tick` hears of every batch of records.
    """
    path = folder / REPORT.format(number=number)
    if path.exists():
        report = ShardReport(**read_json(path))
        tick(report.records)
        return report
    writers = {field: ShardWriter(folder, number, field, job.tokenizer.vocab_size) for field in job.fields}
    kept: list[int] = []
    problems: list[str] = []
    empty = 0
    indices = job.records(number)
    batches = [indices[begin : begin + RECORDS_AT_ONCE] for begin in range(0, len(indices), RECORDS_AT_ONCE)]
    # One batch is tokenised, which is C++, while the one before is written.
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        for batch, (found, ids) in zip(batches, _in_turn(ahead, job, batches), strict=True):
            problems += [str(record) for record in found if isinstance(record, Problem)]
            kept += [i - indices.start for i, record in zip(batch, found, strict=True) if isinstance(record, dict)]
            lengths = [writer.append(ids[field]) for field, writer in writers.items()]
            empty += int(np.count_nonzero(sum(lengths) == 0))
            tick(len(batch))
    tokens = {field: writer.close() for field, writer in writers.items()}
    if len(kept) < len(indices):
        np.save(folder / KEPT.format(number=number), np.array(kept, np.int64))
    files = sorted(folder.glob(f"{number:05d}.*.npy"))
    report = ShardReport(
        records=len(indices),
        kept=len(kept),
        empty=empty,
        tokens=tokens,
        problems=problems,
        hashes={file.name: file_hash(file) for file in files},
        bytes=sum(file.stat().st_size for file in files),
    )
    write_json(path, dataclasses.asdict(report))
    return report


def finish(job: Job, folder: Path, reports: Sequence[ShardReport]) -> None:
    """Writes the manifest and the list of problems, and removes such reports as lie beside them."""
    problems = [problem for report in reports for problem in report.problems]
    lines = "".join(json.dumps({"problem": problem}, ensure_ascii=False) + "\n" for problem in problems)
    (folder / PROBLEMS).write_text(lines, encoding="utf-8")
    shards = [
        {"records": report.records, "kept": report.kept, "tokens": report.tokens, "hashes": report.hashes}
        for report in reports
    ]
    manifest = {
        **dict(zip(IDENTITY, job.identity(), strict=True)),
        "records": sum(report.records for report in reports),
        "kept": sum(report.kept for report in reports),
        "empty": sum(report.empty for report in reports),
        "tokens": {field: sum(report.tokens[field] for report in reports) for field in job.fields},
        "bytes": sum(report.bytes for report in reports),
        "problems": {"count": len(problems), "first": problems[:NAMED]} if problems else {},
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)
    for number in range(len(reports)):
        (folder / REPORT.format(number=number)).unlink(missing_ok=True)


def _check_strict(job: Job, manifest: dict) -> None:
    if job.strict and manifest["problems"]:
        raise UserError(manifest["problems"]["first"][0])


_work: tuple[Job, Destination] | None = None
"""Of a worker process: sent once, not with every shard."""


def _begin_worker(job: Job, destination: Destination) -> None:
    global _work
    _work = job, destination


def _in_worker(number: int) -> ShardReport:
    assert _work is not None
    job, destination = _work
    return destination.write(number, job, lambda done: None)


def _in_turn(
    ahead: concurrent.futures.Executor, job: Job, batches: Sequence[range]
) -> Iterator[tuple[list[Record | Problem], dict[str, list[np.ndarray]]]]:
    """What `_encode` makes of each batch, the next one being made meanwhile."""
    waiting = [ahead.submit(_encode, job, batch) for batch in batches[:1]]
    for batch in [*batches[1:], None]:
        first = waiting.pop() if waiting else None
        if batch is not None:
            waiting.append(ahead.submit(_encode, job, batch))
        if first is not None:
            yield first.result()


def _encode(job: Job, indices: range) -> tuple[list[Record | Problem], dict[str, list[np.ndarray]]]:
    """The records, and by field the ids of those that can be used. A strict job ends at the first that cannot."""
    found = job.source.read(indices)
    try:
        ids = _ids(job, found)
    except UserError:  # some text is not valid Unicode, which is too rare to look for first
        found = [_checked(job, record, index) for record, index in zip(found, indices, strict=True)]
        ids = _ids(job, found)
    if job.strict and (problem := next((record for record in found if isinstance(record, Problem)), None)):
        raise UserError(str(problem))
    return found, ids


def _ids(job: Job, found: Sequence[Record | Problem]) -> dict[str, list[np.ndarray]]:
    records = [record for record in found if not isinstance(record, Problem)]
    ids = {field: job.tokenizer.encode_batch([record[field] for record in records]) for field in job.fields}
    if job.end_each:
        end = np.array([job.tokenizer.eos_id], np.int32)
        ids = {field: [np.concatenate([a, end]) for a in arrays] for field, arrays in ids.items()}
    return ids


def _checked(job: Job, record: Record | Problem, index: int) -> Record | Problem:
    """The record, or what is wrong with it."""
    if isinstance(record, Problem):
        return record
    for field in job.fields:
        try:
            record[field].encode()
        except UnicodeEncodeError:
            return Problem(f"{job.shown} record {index}", f"field {field!r} is not valid Unicode (a lone surrogate)")
    return record
