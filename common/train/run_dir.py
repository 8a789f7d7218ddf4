"""One arm's run directory: who owns it, and whether it is the same run."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from common.config import difference, to_json
from common.errors import UserError
from common.files import read_object, read_rows, write_atomically, write_json, write_rows
from common.train.checkpoints import saved_steps
from common.train.config import Anomalies, only_how
from common.train.schema import SCHEMA_VERSION, check_schema

CHECKPOINTS = "checkpoints"
CONFIG, ENVIRONMENT, METRICS, TIMINGS = "config.json", "environment.json", "metrics.jsonl", "timings.jsonl"
TOKENIZER = "tokenizer"
"""Folder of the files that `common.data.tokenizers.kept` reads."""
RESULT, SAMPLES = "result.json", "samples.jsonl"
INITIAL = "init.json"
"""What a run's parameters began as, where it was not a fresh model."""
LAUNCHES = "launches.jsonl"
"""When each launch of the run began, Unix seconds, and what of the config it changed."""
ROLLBACKS = "rollbacks.jsonl"
"""Which batches are left out because the run was rolled back, and why."""

SAID_SINCE = 'init.tokenizer: (absent) -> "same"'
"""A field that the configs of earlier runs lack, with its default."""

# What decides the bits of a CPU program beside the program itself.
MACHINE_KEYS = ("platform", "device_kind", "devices", "cpu", "threads", "jax", "jaxlib")


@contextlib.contextmanager
def owned(run_dir: Path) -> Iterator[None]:
    """Holds the directory for this process; raises UserError where another has it. A hold ends with its process."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+", encoding="utf-8") as lock:
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
    run_dir: Path, config: dict[str, Any], data: dict[str, str], tokenizer_files: Mapping[str, bytes]
) -> list[str]:
    """Writes the resolved config and the environment, or checks that the directory holds the same run.

    Nothing is refused where nothing has been trained yet: a mistake in the command that came before may be mended.

    `data` identifies what is read (content id, tokenizer's hash); `tokenizer_files` are also written if absent or
    damaged, so that the run can be used without its data. Returns warnings: how this machine differs from the one the
    run was begun on, and which execution fields of the config have changed (`launched` notes that).
    Raises UserError with the difference where the directory belongs to another config or other data.
    """
    here = {**environment(), **data}
    if not has_begun(run_dir) and not _is_same(run_dir, config, data):
        for name in (LAUNCHES, ROLLBACKS, INITIAL):
            (run_dir / name).unlink(missing_ok=True)
        _keep(run_dir / TOKENIZER, tokenizer_files)
        write_json(run_dir / ENVIRONMENT, here)
        write_json(run_dir / CONFIG, described(config))
        return []
    stored = read_described(run_dir / CONFIG)
    if lines := refused(stored, described(config)):
        raise UserError(
            f"{run_dir} holds a run of another config ({'; '.join(lines)}): choose another --run-dir, or remove it"
        )
    if moved := _other_data(run_dir, data):
        other = "; ".join(moved)
        raise UserError(f"{run_dir} was begun on other data ({other}): choose another --run-dir, or remove it")
    _keep(run_dir / TOKENIZER, tokenizer_files)
    before = read_object(run_dir / ENVIRONMENT)
    return [
        f"{key} was {before.get(key)} when this run began and is {here[key]} now: results may differ in the last bits"
        for key in MACHINE_KEYS
        if before.get(key) != here[key]
    ] + [f"{line}: results may differ in the last bits" for line in changes(stored, described(config))]


def _keep(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            write_atomically(path, content)


def has_begun(run_dir: Path) -> bool:
    """Whether anything has been trained in it."""
    return bool(saved_steps(run_dir / CHECKPOINTS) or read_rows(run_dir / METRICS))


def _is_same(run_dir: Path, config: dict[str, Any], data: dict[str, str]) -> bool:
    try:
        return not refused(read_described(run_dir / CONFIG), described(config)) and not _other_data(run_dir, data)
    except UserError:
        return False


def described(config: dict[str, Any]) -> dict[str, Any]:
    """A resolved config as run directories hold it."""
    return {"schema_version": SCHEMA_VERSION, **config}


def read_described(path: Path) -> dict[str, Any]:
    """Reads what `described` made; raises UserError if it cannot be read, or was written by another version."""
    found = read_object(path)
    check_schema(found, path)
    return found


def _other_data(run_dir: Path, data: dict[str, str]) -> list[str]:
    before = read_object(run_dir / ENVIRONMENT)
    return [f"{key}: {before.get(key)} -> {value}" for key, value in data.items() if before.get(key) != value]


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each difference between two configs, but for how patient a run is.

    What was written before a run could say what becomes of anomalies had the defaults.
    """
    if "train" in before:
        before = {**before, "train": {"anomalies": to_json(Anomalies()), **before["train"]}}
    lines = difference(before, now)
    return [line for line in lines if not (line.startswith("train.patience.") or line.endswith(SAID_SINCE))]


def refused(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Those of the changes that make it another run."""
    return [line for line in changes(before, now) if not only_how(line.partition(":")[0])]


def launched(run_dir: Path, config: dict[str, Any], now: float) -> float:
    """Notes a launch that began at `now`, and how it is computed; returns when the first one began (Unix seconds)."""
    changed = changes(read_described(run_dir / CONFIG), described(config))
    launches = [*read_rows(run_dir / LAUNCHES), {"started": now} | ({"changed": changed} if changed else {})]
    write_rows(run_dir / LAUNCHES, launches)
    if changed:
        write_json(run_dir / CONFIG, described(config))
    return float(launches[0]["started"])


def left_out(run_dir: Path, steps: int) -> frozenset[int]:
    """Numbers of the batches, from 1 to `steps`, that roll-backs leave out."""
    batches: set[int] = set()
    for row in read_rows(run_dir / ROLLBACKS):
        first, last = row.get("first"), row.get("step")
        if not (isinstance(first, int) and isinstance(last, int) and 1 <= first <= last <= steps):
            raise UserError(
                f"{run_dir / ROLLBACKS} leaves out batches {first} to {last} of a run of {steps}: restore the file, or "
                "train into another --run-dir"
            )
        batches.update(range(first, last + 1))
    return frozenset(batches)


def leave_out(run_dir: Path, row: dict[str, Any]) -> None:
    """Notes that batches `first` to `step` of `row` are left out from now on, whatever becomes of this process."""
    write_rows(run_dir / ROLLBACKS, [*read_rows(run_dir / ROLLBACKS), row])


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for reports and for judging whether two runs can agree to the bit."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **versions,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu": _cpu_model(),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": commit_of(Path(__file__)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


def commit_of(source: Path) -> str:
    """The commit of the repository that tracks a source file, "-dirty" if it has changes; "unknown" without one."""
    if not _git(source.parent, "ls-files", "--error-unmatch", source.name):  # installed inside another project
        return "unknown"
    return _git(source.parent, "describe", "--always", "--dirty", "--abbrev=12") or "unknown"


def _git(folder: Path, *arguments: str) -> str:
    """The output of git; empty if it fails."""
    try:
        found = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
