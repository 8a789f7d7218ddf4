"""Runs a study on the machines of a Ray cluster: every missing run is a task of its own.

The machines share a file system and have the same installation. Code is not sent, and a study goes to the workers as
JSON, so its own file is not needed there. Ray gives each task a core, or the devices of its mesh. Where a worker is
lost, Ray starts its task again, which resumes from the last checkpoint.

The locks of run directories keep two processes of one machine from training one run. On network storage they may not
be seen by other machines. There it counts that this process submits a run only while none of its tasks works on it,
and that Ray starts a task again only after it has found its worker dead. Two `twinstack run` of one study from two
machines are kept apart only by what a run has written lately (`StudyFolder.standing`).
"""

import fcntl
import functools
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from common.config import from_json, to_json
from common.errors import UserError
from common.terminal import marked_up
from common.train.run_files import StudyFiles
from experiments.members import Member
from experiments.run import Run
from experiments.running.pool import (
    POLL_SECONDS,
    STOPPING,
    Display,
    conclude_with_found,
    received_signals,
    standings_of,
)
from experiments.running.study_folder import StudyFolder
from experiments.study import Study

MOST_LOSSES = 5
"""How often a run is started again after its worker was lost, for lack of memory or with its machine."""
STORAGE_SECONDS = 90.0
"""How long network storage may hide what another machine has written; NFS by default hides new files for 60 s."""
ACCELERATORS = ("GPU", "TPU")
"""What Ray calls them."""
PASSED_ON = ("JAX_", "XLA_", "TWINSTACK_")
"""Environment variables that begin so have the same values in workers as here."""
_held: list[TextIO] = []
"""The lock of this process's core; closing it would release it."""


def run_on_ray(folder: StudyFolder, arms: Sequence[str]) -> int:
    """Trains and scores what is missing of these arms on the cluster at `$RAY_ADDRESS`, or on this machine without it.

    Returns the exit status: 1 if a run failed, 128 + N after signal N. Raises UserError if Ray is not installed or
    cannot be reached, and for mistakes that a worker finds in the study before it trains anything.
    """
    ray, console = _start_ray(), Console()
    try:
        folder.write_list(folder.members())
        tasks = _Tasks(ray, folder, arms)
        tasks.check(console)
        with received_signals() as received:
            with Display(folder, arms, console) as display:
                while not received and tasks.go_on():
                    display.show()
            if received:
                console.print(STOPPING)
                tasks.stop(received)
                return 128 + received[0]
        return conclude_with_found(folder, arms, console)
    finally:
        ray.shutdown()


def _start_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--on ray needs Ray, which is not installed: pip install 'twinstack[ray]'") from None
    variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": variables})
    except (ConnectionError, ValueError, RuntimeError) as error:
        address = os.environ.get("RAY_ADDRESS", "")
        raise UserError(
            f"--on ray: cannot reach Ray{f' at RAY_ADDRESS={address}' if address else ''}: {error}"
        ) from None
    return ray


class _Tasks:
    """The tasks of one launch. A run has one task at a time."""

    def __init__(self, ray: Any, folder: StudyFolder, arms: Sequence[str]):
        self._ray, self._folder, self._arms = ray, folder, tuple(arms)
        self._on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or accelerator(ray.cluster_resources()) is None
        self._order = json.dumps(
            {
                "study": to_json(folder.study),
                "path": str(folder.path.absolute()),
                "arms": self._arms,
                "working_folder": str(Path.cwd()),
                "on_cpu": self._on_cpu,
            }
        )
        self._in_flight: dict[Any, Member] = {}
        self._ended: dict[str, float] = {}
        """When the task of each run ended that was trained or failed."""

    def check(self, console: Console) -> None:
        """Lets a worker look for mistakes before anything is trained; raises UserError for the first."""
        arms = [self._folder.study.arms[name] for name in self._arms]
        largest = max(arms, key=lambda run: run.train.mesh.devices)
        mistake = self._ray.get(self._submit(check, largest, "check"))
        if mistake:
            raise UserError(mistake)
        for remark in self._folder.study.remarks():
            console.print(marked_up(f"warning: {remark}"), soft_wrap=True)

    def go_on(self) -> bool:
        """Submits runs that can start, waits a moment for others to end; returns whether there is anything left."""
        members = self._folder.members()
        self._folder.write_list(members)
        for member in list(self._ready()):
            self._in_flight[self._submit(train, member.run, member.name, member.name)] = member
        if self._in_flight:
            self._collect()
            return True
        time.sleep(POLL_SECONDS if (waits := self._waits()) else 0)
        return waits

    def stop(self, received: Sequence[int]) -> None:
        """Asks all tasks to save and end, and waits for them; a second signal ends the waiting."""
        for reference in self._in_flight:
            self._ray.cancel(reference, force=False)
        while self._in_flight and len(received) < 2:
            self._collect()

    def _submit(self, function: Any, run: Run, name: str, *arguments: str) -> Any:
        needs = resources(run, {} if self._on_cpu else self._ray.cluster_resources())
        remote = self._ray.remote(function).options(max_retries=MOST_LOSSES, name=name, **needs)
        return remote.remote(self._order, *arguments)

    def _ready(self) -> Iterator[Member]:
        at_work = {member.name for member in self._in_flight.values()}
        for member, standing in standings_of(self._folder, self._arms):
            if member.name in at_work or member.name in self._ended or standing.loss is not None:
                continue
            if standing.state != "running" and self._folder.can_start(member):
                yield member

    def _waits(self) -> bool:
        """Returns whether a run is being trained by others, or has ended without its result being visible yet."""
        for member, standing in standings_of(self._folder, self._arms):
            ended = self._ended.get(member.name)
            unseen = standing.state == "waiting" and ended is not None and time.monotonic() - ended < STORAGE_SECONDS
            if unseen or (ended is None and standing.state == "running"):
                return True
        return any(self._ready())

    def _collect(self) -> None:
        ended, _ = self._ray.wait(list(self._in_flight), num_returns=1, timeout=POLL_SECONDS)
        for reference in ended:
            member = self._in_flight.pop(reference)
            try:
                state = self._ray.get(reference)
            except self._ray.exceptions.TaskCancelledError:
                continue
            except self._ray.exceptions.RayError as error:
                self._folder.note_failure(member, _in_short(error), diverged=False)
                state = "failed"
            if state in ("done", "failed"):  # else another process has the run, or its machine asked it to end
                self._ended[member.name] = time.monotonic()


def _in_short(error: Exception) -> str:
    """Returns the kind of the error and the last line of its message, which in Ray may be a whole traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def accelerator(cluster: Mapping[str, float]) -> str | None:
    """Returns the kind of accelerator that a cluster with these resources has; None without any."""
    return next((kind for kind in ACCELERATORS if cluster.get(kind)), None)


def resources(run: Run, cluster: Mapping[str, float]) -> dict[str, Any]:
    """Returns the options of `ray.remote` that reserve what a run computes on.

    >>> from experiments.first_light import first_light
    >>> run = first_light().arms["gpt"]
    >>> resources(run, {"CPU": 8.0}), resources(run, {"CPU": 8.0, "GPU": 4.0})
    ({'num_cpus': 1}, {'num_cpus': 1, 'num_gpus': 1})
    """
    devices, kind = run.train.mesh.devices, accelerator(cluster)
    if kind is None:
        return {"num_cpus": 1}
    return {"num_cpus": 1, "num_gpus": devices} if kind == "GPU" else {"num_cpus": 1, "resources": {kind: devices}}


def check(order: str) -> str:
    """Task: looks for mistakes in the study; returns the first one's message, or nothing."""
    try:
        worker, _ = _begin(order)
        worker.check()
    except UserError as error:
        return str(error)
    return ""


def train(order: str, name: str) -> str:
    """Task: trains and scores one run; returns its state, which is `waiting` if it was asked to end early."""
    worker, folder = _begin(order)
    try:
        worker.work_on(name)
    except SystemExit:  # saved after a signal or `ray.cancel`; Ray would take it for a lost worker
        return "waiting"
    member = folder.member(name)
    assert member is not None
    return folder.standing(member).state


@functools.cache
def _begin(order: str) -> tuple[Any, StudyFolder]:
    """Prepares this process for a study's runs, once."""
    given = json.loads(order)
    path, host = Path(given["path"]), socket.gethostname()
    try:
        os.chdir(given["working_folder"])  # relative paths in a study mean this one
    except OSError as error:
        raise UserError(f"{host}: {error}: machines must share this folder") from None
    if not (path / StudyFiles.STUDY).is_file():
        raise UserError(f"{host} does not have {path}: machines must share this folder")
    if given["on_cpu"]:
        from common.allocator import keep_freed_memory

        keep_freed_memory()
        _take_core()
    from experiments.running.execute import StudyWorker
    from experiments.running.jax_setup import set_up_jax

    set_up_jax()
    folder = StudyFolder(path, from_json(Study, given["study"]))
    logs = path / "workers"
    logs.mkdir(exist_ok=True)
    log = open(logs / f"{host}-{os.getpid()}.log", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    return StudyWorker(folder, Console(file=log), arms=given["arms"], verifies=False), folder


def _take_core() -> None:
    """Restricts this process to a core that no other worker of this machine has; XLA makes a thread for each core.

    With more workers than cores, some share one.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    for core in cores:
        lock = open(Path(tempfile.gettempdir()) / f"twinstack-{os.getuid()}-core-{core}", "a", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        os.sched_setaffinity(0, {core})
        return
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
