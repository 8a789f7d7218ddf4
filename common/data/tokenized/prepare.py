"""Tokenising a source into shards: over several processes, going on where a killed one stopped, with a manifest.

A shard is a range of records. Writing one (`common.data.tokenized.shards`) is all of the work wherever it runs: in this
process, in several, or in an Apache Beam pipeline (`common.data.tokenized.beam`).
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from common.data.cache import adopt, listed, locked, put, say_damage, whole
from common.data.progress import counter
from common.data.tokenized.prepared import (
    IDENTITY,
    MANIFEST,
    PROBLEMS,
    VARIABLE,
    Prepared,
    as_written,
    find_elsewhere,
)
from common.data.tokenized.shards import REPORT, ShardReport, ShardTask, write_shard
from common.errors import UserError
from common.files import read_json, write_json
from common.terminal import harmless

NAMED = 3
"""Problems that a warning names; all are in the file."""

_log = logging.getLogger(__name__)


class Destination(Protocol):
    """Where a tokenised source is put: a folder here, or an url (`common.data.tokenized.remote`).

    Objects can be sent to other processes.
    """

    def manifest(self) -> dict | None:
        """None unless all is there."""
        ...

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Keeps others from making the same."""
        ...

    def write(self, number: int, task: ShardTask, tick: Callable[[int], None]) -> ShardReport:
        """Puts shard `number` there, unless it is there already."""
        ...

    def finish(self, task: ShardTask, reports: Sequence[ShardReport]) -> None:
        """Makes all shards into one whole."""
        ...


@dataclasses.dataclass(frozen=True)
class Folder:
    """On this machine; it appears when it is whole."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def manifest(self) -> dict | None:
        return read_json(self.path / MANIFEST) if whole(self.path) else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with locked(self.path):
            if (self._part / MANIFEST).exists():
                if as_written(self._part):  # only the move was missing
                    put(self._part, self.path)
                else:
                    shutil.rmtree(self._part)
            if self.path.exists() and not listed(self.path) and as_written(self.path):
                adopt(self.path)
            say_damage(self.path)
            yield

    def write(self, number: int, task: ShardTask, tick: Callable[[int], None]) -> ShardReport:
        self._part.mkdir(parents=True, exist_ok=True)
        return write_shard(number, task, self._part, tick)

    def finish(self, task: ShardTask, reports: Sequence[ShardReport]) -> None:
        finish(task, self._part, reports)
        put(self._part, self.path)

    @property
    def _part(self) -> Path:
        return self.path.parent / f".{self.path.name}.part"


def open_tokenized(task: ShardTask, cache_dir: Path, workers: int | None = None) -> Prepared:
    """The tokenised source: from the cache, from `$TWINSTACK_PREPARED`, or made now in the cache.

    Raises UserError for a record that cannot be used where the task is strict.
    """
    folder = cache_dir / "tokenized" / task.key()
    if not folder.exists():
        if prepared := find_elsewhere(task.key(), task.identity(), cache_dir):
            _check(task, prepared.manifest)
            return prepared
        if elsewhere := os.environ.get(VARIABLE):
            absent = harmless(f"{task.shown} is not in {elsewhere}")
            _log.warning("%s and is tokenised here; its key is %s", absent, task.key())
    make(task, Folder(folder), functools.partial(write_all, workers=workers))
    return Prepared.open(folder)


def prepare(task: ShardTask, folder: Path, workers: int | None = None) -> Prepared:
    """The tokenised source in `folder`: as it lies there, or made now.

    Shards that a killed process finished are kept. Records that cannot be used are left out, counted and named in
    `problems.jsonl`, and a warning says so.

    Args:
      workers: processes; None: as many as there are cores, where there are several shards.

    Raises UserError for a record that cannot be used where the task is strict.
    """
    make(task, Folder(folder), functools.partial(write_all, workers=workers))
    prepared = Prepared.open(folder)
    warn_of_problems(task, prepared)
    return prepared


def make(
    task: ShardTask, destination: Destination, write: Callable[[ShardTask, Destination], Sequence[ShardReport]]
) -> dict:
    """The manifest of what lies at the destination; what is not there yet is made by `write`, such as `write_all`.

    Raises UserError for a record that cannot be used where the task is strict.
    """
    _refuse_to_wait_for_itself()
    manifest = destination.manifest()
    if manifest is None:
        with destination.alone():
            manifest = destination.manifest()
            if manifest is None:
                destination.finish(task, write(task, destination))
                manifest = destination.manifest()
    assert manifest is not None
    _check(task, manifest)
    return manifest


def write_all(task: ShardTask, destination: Destination, workers: int | None = None) -> list[ShardReport]:
    """Every shard, by so many processes on this machine; None: as many as there are cores."""
    shards = task.shards()
    workers = min(shards, workers or os.cpu_count() or 1)
    with counter("tokenising", len(task.source)) as tick:
        if workers == 1:
            return [destination.write(number, task, tick) for number in range(shards)]
        # Not by fork: a process with JAX's threads in it cannot be forked safely.
        context = multiprocessing.get_context("spawn")
        reports = []
        with concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (task, destination)) as pool:
            for report in pool.map(_in_worker, range(shards)):
                tick(report.records)
                reports.append(report)
        return reports


def warn_of_problems(task: ShardTask, prepared: Prepared) -> None:
    """Where records were left out."""
    if problems := prepared.manifest["problems"]:
        _log.warning(
            "%d of %d records of %s cannot be used and are left out (source.strict=true stops instead): %s; all: %s",
            *(problems["count"], prepared.manifest["records"], harmless(task.shown)),
            *(harmless("; ".join(problems["first"])), harmless(f"{prepared.where}/{PROBLEMS}")),
        )


def finish(task: ShardTask, folder: Path, reports: Sequence[ShardReport]) -> None:
    """Writes the manifest and the list of problems, and removes such reports as lie beside them."""
    problems = [problem for report in reports for problem in report.problems]
    lines = "".join(json.dumps({"problem": problem}, ensure_ascii=False) + "\n" for problem in problems)
    (folder / PROBLEMS).write_text(lines, encoding="utf-8")
    shards = [
        {"records": report.records, "kept": report.kept, "tokens": report.tokens, "hashes": report.hashes}
        for report in reports
    ]
    manifest = {
        **dict(zip(IDENTITY, task.identity(), strict=True)),
        "records": sum(report.records for report in reports),
        "kept": sum(report.kept for report in reports),
        "empty": sum(report.empty for report in reports),
        "tokens": {field: sum(report.tokens[field] for report in reports) for field in task.fields},
        "bytes": sum(report.bytes for report in reports),
        "problems": {"count": len(problems), "first": problems[:NAMED]} if problems else {},
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)
    for number in range(len(reports)):
        (folder / REPORT.format(number=number)).unlink(missing_ok=True)


def _check(task: ShardTask, manifest: dict) -> None:
    problems = manifest["problems"]
    if problems and task.strict:
        raise UserError(problems["first"][0])
    if problems and not manifest["kept"]:
        raise UserError(f"none of {task.shown}'s {manifest['records']} records can be used; {problems['first'][0]}")


def _refuse_to_wait_for_itself() -> None:
    """Raises RuntimeError in a worker that is still importing the main script: it would wait for its own parent."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "tokenising starts processes, and each imports the script that was started: "
            'put what that script does under `if __name__ == "__main__":`'
        )


_work: tuple[ShardTask, Destination] | None = None
"""Of a worker process: sent once, not with every shard."""


def _begin_worker(task: ShardTask, destination: Destination) -> None:
    global _work
    _work = task, destination


def _in_worker(number: int) -> ShardReport:
    assert _work is not None
    task, destination = _work
    return destination.write(number, task, lambda done: None)
