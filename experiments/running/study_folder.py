"""A study's directory: where its runs are and how far each one is. Reading it needs neither data nor JAX."""

import contextlib
import dataclasses
import fcntl
import fnmatch
import functools
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from common.config import to_json
from common.errors import UserError, nearest
from common.files import read_json, read_object, write_atomically, write_json
from common.report.run_list import ListedRun, RunList
from common.train.run_files import RunFiles, StudyFiles
from common.train.schema import SCHEMA_VERSION
from experiments.members import Losses, Member, Members, members_of
from experiments.run import identity, restore_run
from experiments.study import Study

QUIET_SECONDS = 120.0
"""A run of another machine, whose lock this one may not see, counts as running if it wrote a step more recently."""

LOCK_ATTEMPTS, LOCK_PAUSE_SECONDS = 5, 0.02
TAIL_BYTES = 4096
"""More than a row of `timings.jsonl` is long."""

State = Literal["done", "running", "failed", "waiting"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run is."""

    state: State
    step: int = 0
    """The last step that it recorded."""
    loss: float | None = None
    """Final validation loss of a run that is done; infinite for one that diverged."""
    why: str = ""
    """Why it failed."""


class StudyFolder:
    """The directory of a study, with one directory for each run that was trained there."""

    def __init__(self, path: Path, study: Study, overrides: Sequence[str] = (), runs: Sequence[str] = ()):
        """
        Args:
          overrides: what the study was changed by, for the report.
          runs: patterns of the names of the runs to work on; without any, all.
        """
        self.path, self.study, self.overrides, self._runs = path, study, tuple(overrides), tuple(runs)
        self._elsewhere: dict[str, Path] | None = None
        self._done: dict[str, Standing] = {}
        self._found: tuple[Losses, Members] | None = None
        self._listed: Members | None = None

    def members(self) -> Members:
        """Returns the runs that follow from the results so far."""
        losses, members = self._found or ({}, members_of(self.study, {}))
        while True:
            standings = ((member.key, self.standing(member)) for member in members.members)
            known = {key: standing.loss for key, standing in standings if standing.loss is not None}
            if known == losses:
                self._found = losses, members
                return members
            losses, members = known, members_of(self.study, known)

    def member(self, name: str) -> Member | None:
        """Returns the run of this name; None if it does not follow from the results so far."""
        return next((member for member in self.members().members if member.name == name), None)

    def wanted(self, arms: Collection[str]) -> list[Member]:
        """Returns the runs of these arms to work on that follow from the results so far.

        Raises UserError where none has a name that was asked for.
        """
        members = self.members()
        found = {member.name: member for member in members.members if member.arm in arms}
        if not self._runs:
            return list(found.values())
        kept = [name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in self._runs)]
        if not kept and members.complete:
            raise UserError(f"no run has run={','.join(self._runs)}: {nearest(self._runs[0], found)}")
        for name in kept:  # grows while it is read
            after = found[name].run.after
            if after is not None and after.run not in kept:
                kept.append(after.run)
        return [member for name, member in found.items() if name in kept]

    def can_start(self, member: Member) -> bool:
        """Returns whether the run that it starts from, if any, is done."""
        if member.run.after is None:
            return True
        before = self.member(member.run.after.run)
        return before is not None and self.standing(before).state == "done"

    def run_dir(self, member: Member) -> Path:
        """Returns the run's directory: in this study's, or in a neighbouring study's that has scored it alike."""
        own = self.path / member.name
        if (own / RunFiles.CONFIG).exists():
            return own
        neighbour = self._neighbour(member)
        scored = _read_or_none(neighbour / RunFiles.RESULT) if neighbour is not None else None
        return neighbour if neighbour and scored and scored.get("made_from") == member.made_from else own

    def adopt(self, member: Member) -> bool:
        """Copies the run from a neighbouring study that trained it but scored it otherwise; returns whether it did."""
        own, neighbour = self.path / member.name, self._neighbour(member)
        if neighbour is None or (own / RunFiles.CONFIG).exists():
            return False
        left_there = shutil.ignore_patterns(RunFiles.CONFIG, *RunFiles.OF_ONE_STUDY)
        shutil.copytree(neighbour, own, ignore=left_there, dirs_exist_ok=True)
        write_atomically(own / RunFiles.CONFIG, (neighbour / RunFiles.CONFIG).read_bytes())  # last: now it is whole
        return True

    def _neighbour(self, member: Member) -> Path | None:
        """Returns the directory of the same run in a neighbouring study, if it is finished there."""
        if self._elsewhere is None:
            self._elsewhere = _finished_runs(self.path)
        return self._elsewhere.get(member.identity)

    def standing(self, member: Member) -> Standing:
        """Returns how far the run is, whoever trains it; a run that was found done once is not looked at again."""
        if member.name not in self._done:
            standing = self._look(member)
            if standing.state != "done":
                return standing
            self._done[member.name] = standing
        return self._done[member.name]

    def _look(self, member: Member) -> Standing:
        folder = self.run_dir(member)
        result = _read_or_none(folder / RunFiles.RESULT)
        if result is not None and result.get("made_from") == member.made_from:
            return Standing(state="done", step=member.run.steps, loss=float(result["validation_loss"]))
        step = int(last_timing(folder).get("step", 0))
        if _is_held(folder / RunFiles.WORKER) or _is_held(folder / RunFiles.LOCK):
            return Standing(state="running", step=step)
        failure = _read_or_none(self.path / member.name / RunFiles.FAILURE)
        if failure is not None and failure.get("identity") == member.identity:
            loss = math.inf if failure.get("diverged") else None
            return Standing(state="failed", step=step, why=str(failure.get("error", "")), loss=loss)
        elsewhere = _machine_of(folder / RunFiles.WORKER) not in ("", socket.gethostname())
        if result is None and step and elsewhere and _age(folder / RunFiles.TIMINGS) < QUIET_SECONDS:
            return Standing(state="running", step=step)
        return Standing(state="waiting", step=step)

    def write_list(self, members: Members) -> None:
        """Writes `study.json` and `runs.json`, from which reports are made, unless they were written for these runs."""
        if members is self._listed:
            return
        compared, losses = {member.name for member in members.of_comparison()}, self._found[0] if self._found else {}
        listed = RunList(
            runs=tuple(
                ListedRun(
                    name=member.name,
                    arm=member.arm,
                    seed=member.seed,
                    identity=member.identity,
                    folder=os.path.relpath(self.run_dir(member), self.path),
                    labels=member.run.labels,
                    compared=member.name in compared,
                    tried=dict(member.trial.also),
                    diverged=losses.get(member.key) == math.inf,
                )
                for member in members.members
            ),
            chosen=dict(members.chosen),
            complete=members.complete,
            overrides=self.overrides,
        )
        self.path.mkdir(parents=True, exist_ok=True)
        for name, content in ((StudyFiles.STUDY, to_json(self.study)), (StudyFiles.RUNS, dataclasses.asdict(listed))):
            described = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, **content}))
            if _read_or_none(self.path / name) != described:
                write_json(self.path / name, described)
        self._listed = members

    def note_failure(self, member: Member, error: str, *, diverged: bool) -> None:
        """Records why the run's launch failed, until it is finished."""
        failure = {"identity": member.identity, "error": error, "diverged": diverged, "time": time.time()}
        write_json(self.path / member.name / RunFiles.FAILURE, failure)

    def forget_failure(self, member: Member) -> None:
        (self.path / member.name / RunFiles.FAILURE).unlink(missing_ok=True)


@contextlib.contextmanager
def working_on(folder: Path) -> Iterator[bool]:
    """Locks a run directory for a worker that trains and scores it; yields False if another worker has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / RunFiles.WORKER, "a+", encoding="utf-8") as lock:
        if not _lock(lock):
            yield False
            return
        lock.truncate(0)
        lock.write(f"{socket.gethostname()}\n")
        lock.flush()
        yield True


def _lock(lock: TextIO) -> bool:
    """Locks a file, and returns whether it could; tries again if `_is_held` of another process may be looking at it."""
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(LOCK_PAUSE_SECONDS)
    return False


def _is_held(lock: Path) -> bool:
    """Returns whether a process of this machine holds the lock; holds it itself for a moment to find out."""
    try:
        with open(lock, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _machine_of(lock: Path) -> str:
    """Returns the name of the machine that last worked on a run; "" if there is none."""
    try:
        return lock.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _age(path: Path) -> float:
    """Returns for how many seconds a file has not been written."""
    return time.time() - path.stat().st_mtime


def _finished_runs(study_dir: Path) -> dict[str, Path]:
    """Returns the directories of the finished runs of neighbouring studies, by identity."""
    found = {}
    for listing in sorted(study_dir.parent.glob(f"*/{StudyFiles.RUNS}")):
        if listing.parent == study_dir:
            continue
        for row in (_read_or_none(listing) or {}).get("runs", ()):
            folder = listing.parent / row["folder"]
            if (folder / RunFiles.RESULT).exists() and stored_identity(folder) == row["identity"]:
                found[row["identity"]] = folder
    return found


def stored_identity(run_dir: Path) -> str | None:
    """Returns the identity of the run that a directory holds; None if its config cannot be read."""
    path = run_dir / RunFiles.CONFIG
    try:
        return _identity(path, path.stat().st_mtime_ns)
    except (OSError, UserError):
        return None


@functools.lru_cache(maxsize=4096)
def _identity(path: Path, changed: int) -> str:
    """`changed` makes a rewritten file be read again."""
    stored = read_object(path)
    stored.pop("schema_version", None)
    return identity(restore_run(stored))


def last_timing(folder: Path) -> dict[str, Any]:
    """Returns the last whole row of `timings.jsonl`, read from the end since the file may be long; {} without one."""
    try:
        with open(folder / RunFiles.TIMINGS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            *complete, _ = file.read().split(b"\n")
        return dict(json.loads(complete[-1])) if complete else {}
    except (OSError, ValueError, TypeError):
        return {}


def _read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except (OSError, UserError):
        return None
    return found if isinstance(found, dict) else None
