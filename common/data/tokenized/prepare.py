"""Tokenises a source into shards with a manifest, over several processes; resumes where a killed one stopped.

A shard is a range of records. All of the work is to write one (`common.data.tokenized.shards`), in this process, in
several, or in an Apache Beam pipeline (`common.data.tokenized.beam`).
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

from common.data.cache import adopt, listed, locked, put, warn_of_damage, whole
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
from common.progress import counter
from common.terminal import harmless

NAMED = 3
"""Problems that a warning names; the file `PROBLEMS` has all of them."""

_log = logging.getLogger(__name__)


class Destination(Protocol):
    """Where a tokenised source is written: a local folder, or a URL (`common.data.tokenized.remote`).

    Processes can send it to each other.
    """

    def manifest(self) -> dict | None:
        """Returns the manifest; None unless the source is complete."""
        ...

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from writing the same source, where that is possible."""
        ...

    def write(self, shard: int, task: ShardTask, tick: Callable[[int], None]) -> ShardReport:
        """Writes one shard, unless it is there already."""
        ...

    def finish(self, task: ShardTask, reports: Sequence[ShardReport]) -> None:
        """Completes the source after all shards are written."""
        ...


@dataclasses.dataclass(frozen=True)
class Folder:
    """A local folder, which appears at `path` when it is complete."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def manifest(self) -> dict | None:
        return read_json(self.path / MANIFEST) if whole(self.path) else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        with locked(self.path):
            if (self._part / MANIFEST).exists():
                if as_written(self._part):  # an earlier process died just before the move
                    put(self._part, self.path)
                else:
                    shutil.rmtree(self._part)
            if self.path.exists() and not listed(self.path) and as_written(self.path):
                adopt(self.path)
            warn_of_damage(self.path)
            yield

    def write(self, shard: int, task: ShardTask, tick: Callable[[int], None]) -> ShardReport:
        self._part.mkdir(parents=True, exist_ok=True)
        return write_shard(shard, task, self._part, tick)

    def finish(self, task: ShardTask, reports: Sequence[ShardReport]) -> None:
        finish(task, self._part, reports)
        put(self._part, self.path)

    @property
    def _part(self) -> Path:
        return self.path.parent / f".{self.path.name}.part"


def open_tokenized(task: ShardTask, cache_dir: Path, workers: int | None = None) -> Prepared:
    """Opens the tokenised source from the cache or from `$TWINSTACK_PREPARED`, or makes it in the cache.

    Raises UserError for a record that a strict task cannot use.
    """
    folder = cache_dir / "tokenized" / task.key()
    if not folder.exists():
        if prepared := find_elsewhere(task.key(), task.identity(), cache_dir):
            _check(task, prepared.manifest)
            return prepared
        if elsewhere := os.environ.get(VARIABLE):
            absent = harmless(f"{task.shown} is not in {elsewhere}")
            _log.warning("%s and is tokenised on this machine; its key is %s", absent, task.key())
    make(task, Folder(folder), functools.partial(write_all, workers=workers))
    return Prepared.open(folder)


def prepare(task: ShardTask, folder: Path, workers: int | None = None) -> Prepared:
    """Opens the tokenised source in `folder`, after making what is missing.

    Shards that a killed process finished are kept. Records that cannot be used are skipped, counted, listed in
    `problems.jsonl` and named in a warning.

    Args:
      workers: processes; None: one for each core.

    Raises UserError for a record that a strict task cannot use.
    """
    make(task, Folder(folder), functools.partial(write_all, workers=workers))
    prepared = Prepared.open(folder)
    warn_of_problems(task, prepared)
    return prepared


def make(
    task: ShardTask, destination: Destination, write: Callable[[ShardTask, Destination], Sequence[ShardReport]]
) -> dict:
    """Returns the manifest of the source at the destination; if that is not complete, `write` (such as `write_all`)
    writes its shards first.

    Raises UserError for a record that a strict task cannot use.
    """
    _check_not_importing_main()
    manifest = destination.manifest()
    if manifest is None:
        with destination.locked():
            manifest = destination.manifest()
            if manifest is None:
                destination.finish(task, write(task, destination))
                manifest = destination.manifest()
    assert manifest is not None
    _check(task, manifest)
    return manifest


def write_all(task: ShardTask, destination: Destination, workers: int | None = None) -> list[ShardReport]:
    """Writes every shard, with `workers` processes on this machine (None: one for each core)."""
    shards = task.shards()
    workers = min(shards, workers or os.cpu_count() or 1)
    with counter("tokenising", len(task.source)) as tick:
        if workers == 1:
            return [destination.write(shard, task, tick) for shard in range(shards)]
        # A process that has JAX's threads cannot be forked safely.
        context = multiprocessing.get_context("spawn")
        reports = []
        with concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker, (task, destination)) as pool:
            for report in pool.map(_in_worker, range(shards)):
                tick(report.records)
                reports.append(report)
        return reports


def warn_of_problems(task: ShardTask, prepared: Prepared) -> None:
    """Logs a warning if records were skipped."""
    if problems := prepared.manifest["problems"]:
        _log.warning(
            "%d of %d records of %s cannot be used and are skipped (source.strict=true stops instead): %s; all: %s",
            *(problems["count"], prepared.manifest["records"], harmless(task.shown)),
            *(harmless("; ".join(problems["first"])), harmless(f"{prepared.where}/{PROBLEMS}")),
        )


def finish(task: ShardTask, folder: Path, reports: Sequence[ShardReport]) -> None:
    """Writes the manifest and the list of problems to `folder`, and removes the shards' reports there."""
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
    for shard in range(len(reports)):
        (folder / REPORT.format(shard=shard)).unlink(missing_ok=True)


def _check(task: ShardTask, manifest: dict) -> None:
    """Raises UserError if a strict task has problems, or no record can be used."""
    problems = manifest["problems"]
    if problems and task.strict:
        raise UserError(problems["first"][0])
    if problems and not manifest["kept"]:
        raise UserError(f"none of {task.shown}'s {manifest['records']} records can be used; {problems['first'][0]}")


def _check_not_importing_main() -> None:
    """Raises RuntimeError in a worker that is still importing the main script: it would wait for its parent's lock."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "tokenising starts processes, and each imports the main script: "
            'put what that script does under `if __name__ == "__main__":`'
        )


_work: tuple[ShardTask, Destination] | None = None
"""Set in worker processes: sent once, not with every shard."""


def _begin_worker(task: ShardTask, destination: Destination) -> None:
    global _work
    _work = task, destination


def _in_worker(shard: int) -> ShardReport:
    assert _work is not None
    task, destination = _work
    return destination.write(shard, task, lambda done: None)
