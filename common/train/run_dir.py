"""One arm's run directory: which process owns it, and whether it holds the same run."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.config import Change, difference
from common.errors import UserError
from common.files import read_object, read_rows, write_atomically, write_json, write_rows
from common.train.checkpoints import saved_steps
from common.train.config import decides_result, only_watches
from common.train.environment import MACHINE_KEYS, environment
from common.train.run_files import RunFiles
from common.train.schema import SCHEMA_VERSION, check_schema

Complete = Callable[[dict[str, Any]], dict[str, Any]]
"""Adds the fields that a config written by an earlier version lacks."""


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Locks the directory for this process until the context or the process ends.

    Raises UserError if another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / RunFiles.LOCK, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise UserError(
                f"{run_dir} is being trained by process {owner}: wait for it, or choose another --run-dir"
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def claim(
    run_dir: Path,
    config: dict[str, Any],
    data: dict[str, str],
    tokenizer_files: Mapping[str, bytes],
    complete: Complete = dict,
) -> list[str]:
    """Writes the resolved config and the environment, or checks that the directory holds the same run.

    A directory in which nothing has been trained yet is simply overwritten, so that a mistake in an earlier command
    can be corrected.

    `data` identifies the training data (content id, hash of the tokenizer). `tokenizer_files` are written too, or
    rewritten if missing or damaged, so that the run can be used without its data. Returns warnings: how this machine
    differs from the one that began the run, and which execution fields have changed (`note_launch` records those).
    Raises UserError with the difference if the directory belongs to another config or other data.
    """
    here = {**environment(), **data}
    if not has_begun(run_dir) and not _is_same(run_dir, config, data, complete):
        for name in (RunFiles.LAUNCHES, RunFiles.ROLLBACKS, RunFiles.INITIAL):
            (run_dir / name).unlink(missing_ok=True)
        _keep(run_dir / RunFiles.TOKENIZER, tokenizer_files)
        write_json(run_dir / RunFiles.ENVIRONMENT, here)
        write_json(run_dir / RunFiles.CONFIG, described(config))
        return []
    stored = stored_config(run_dir, complete)
    if changes := identity_changes(stored, config):
        listed = "; ".join(map(str, changes))
        raise UserError(f"{run_dir} holds a run of another config ({listed}): choose another --run-dir, or remove it")
    if other := other_data(run_dir, data):
        raise UserError(
            f"{run_dir} was begun on other data ({'; '.join(other)}): choose another --run-dir, or remove it"
        )
    _keep(run_dir / RunFiles.TOKENIZER, tokenizer_files)
    before = read_object(run_dir / RunFiles.ENVIRONMENT)
    machine = [
        f"{key} was {before.get(key)} when this run began and is {here[key]} now"
        for key in MACHINE_KEYS
        if before.get(key) != here[key]
    ]
    execution = map(str, config_changes(stored, config))
    return [f"{change}: results may differ in the last bits" for change in (*machine, *execution)]


def _keep(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)


def has_begun(run_dir: Path) -> bool:
    """Returns whether anything has been trained in the directory."""
    return bool(saved_steps(run_dir / RunFiles.CHECKPOINTS) or read_rows(run_dir / RunFiles.METRICS))


def _is_same(run_dir: Path, config: dict[str, Any], data: dict[str, str], complete: Complete) -> bool:
    try:
        return not identity_changes(stored_config(run_dir, complete), config) and not other_data(run_dir, data)
    except UserError:
        return False


def described(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a resolved config as run directories hold it, with the schema version."""
    return {"schema_version": SCHEMA_VERSION, **config}


def read_described(path: Path) -> dict[str, Any]:
    """Reads what `described` made. Raises UserError if it is unreadable or another version wrote it."""
    found = read_object(path)
    check_schema(found, path)
    return found


def stored_config(run_dir: Path, complete: Complete = dict) -> dict[str, Any]:
    """Reads the run's resolved config and completes it. Raises UserError as `read_described` and `complete` do."""
    path = run_dir / RunFiles.CONFIG
    found = read_described(path)
    found.pop("schema_version", None)
    try:
        return complete(found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def other_data(run_dir: Path, data: dict[str, str]) -> list[str]:
    """Returns a line for each entry of `data` that was another one when the run began."""
    before = read_object(run_dir / RunFiles.ENVIRONMENT)
    return [f"{key}: {before.get(key)} -> {value}" for key, value in data.items() if before.get(key) != value]


def config_changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Returns the differences between two configs that may change a result, if only in its last bits."""
    return [change for change in difference(before, now) if not only_watches(change.path)]


def identity_changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Returns the differences that make it another run, not the same run computed or watched in another way."""
    return [change for change in difference(before, now) if decides_result(change.path)]


def note_launch(run_dir: Path, config: dict[str, Any], now: float, complete: Complete = dict) -> float:
    """Records a launch that began at `now` and how it computes; returns when the first one began (Unix seconds)."""
    stored = stored_config(run_dir, complete)
    changes = config_changes(stored, config)
    launch: dict[str, Any] = {"started": now}
    if changes:
        launch["changed"] = [str(change) for change in changes]
    launches = [*read_rows(run_dir / RunFiles.LAUNCHES), launch]
    write_rows(run_dir / RunFiles.LAUNCHES, launches)
    if stored != config:
        write_json(run_dir / RunFiles.CONFIG, described(config))
    return float(launches[0]["started"])


def refresh(run_dir: Path, about: str, complete: Complete) -> None:
    """Gives the config of a finished run today's prose, and the fields that its version lacked, at their defaults.

    A comparison can then hold its fields against those of arms that were trained later.
    """
    refreshed = described({**stored_config(run_dir, complete), "about": about})
    if refreshed != read_described(run_dir / RunFiles.CONFIG):
        write_json(run_dir / RunFiles.CONFIG, refreshed)


def rolled_back_batches(run_dir: Path, steps: int) -> frozenset[int]:
    """Returns the numbers of the batches, from 1 to `steps`, that rollbacks skip."""
    batches: set[int] = set()
    for row in read_rows(run_dir / RunFiles.ROLLBACKS):
        first, last = row.get("first"), row.get("step")
        if not (isinstance(first, int) and isinstance(last, int) and 1 <= first <= last <= steps):
            raise UserError(
                f"{run_dir / RunFiles.ROLLBACKS} skips batches {first} to {last} of a run of {steps}: restore the "
                "file, or train into another --run-dir"
            )
        batches.update(range(first, last + 1))
    return frozenset(batches)


def note_rollback(run_dir: Path, row: dict[str, Any]) -> None:
    """Records that batches `first` to `step` of `row` are skipped from now on, even if this process is killed."""
    write_rows(run_dir / RunFiles.ROLLBACKS, [*read_rows(run_dir / RunFiles.ROLLBACKS), row])
