"""Training steps compiled for other machines: one process each, side by side, answers kept in the cache.

This module is also the program of such a process: `python -m experiments.planning.jobs REQUEST.json ANSWER.json`.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from common.compute.aot import Compiled, compile_step, devices_of, environment
from common.compute.topology import Topology
from common.config import from_json, to_json
from common.data.cache import default_cache_dir, put, say_damage, whole
from common.errors import UserError
from common.files import read_json, write_json
from common.terminal import marked_up
from experiments.config import Experiment

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "experiments", "gpt", "t5like")
"""A compiled step may depend on any of their modules."""
PROCESSES = 2
"""At a time: each takes one core and some GB of memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One arm of an experiment whose mesh is the topology's."""

    experiment: Experiment
    arm: str
    topology: Topology

    def key(self) -> str:
        """Of everything that the answer depends on."""
        config = to_json(self.experiment)
        data = {name: config["data"][name] for name in ("rows", "input_length", "target_length")}
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")}
        parts = [config["arms"][self.arm]["model"], config["train"], data, str(self.topology), versions, _sources()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def compile_all(jobs: Sequence[Job], console: Console) -> list[Compiled]:
    """The answers in order, from the cache where they are there.

    Raises UserError where libtpu is not installed, and with the last line of what the compiler says where it fails.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, the compiler for TPUs, is not installed; it needs no TPU: pip install 'twinstack[plan]'"
        )
    paths = [default_cache_dir() / "plans" / f"{job.key()}.json" for job in jobs]
    waiting = [(job, path) for job, path in zip(jobs, paths, strict=True) if not whole(path)]
    for _, path in waiting:
        say_damage(path)
    with tempfile.TemporaryDirectory(prefix="twinstack-plan-") as folder, contextlib.ExitStack() as stack:
        running: list[_Process] = []
        status = stack.enter_context(console.status("")) if waiting and console.is_terminal else None
        started = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < PROCESSES:
                job, path = waiting.pop(0)
                console.print(marked_up(f"compiling {job.arm} for {job.topology}, mesh {job.experiment.train.mesh}"))
                process = _Process(job, path, Path(folder) / f"{path.stem}")
                stack.callback(process.end)
                running.append(process)
            time.sleep(0.1)
            for process in [process for process in running if process.ended()]:
                running.remove(process)
                process.check()
                console.print(f"{marked_up(process.job.arm)}: {process.seconds():.0f} s")
            if status is not None:
                names = ", ".join(process.job.arm for process in running)
                status.update(marked_up(f"compiling {names}: {time.perf_counter() - started:.0f} s"))
    return [from_json(Compiled, read_json(path)) for path in paths]


class _Process:
    """A compiler at work."""

    def __init__(self, job: Job, answer: Path, folder: Path):
        self.job, self.started = job, time.perf_counter()
        folder.mkdir(parents=True)
        answer.parent.mkdir(parents=True, exist_ok=True)
        request, self.log = folder / "request.json", folder / "log.txt"
        write_json(
            request,
            {
                "experiment": to_json(job.experiment),
                "arm": job.arm,
                "topology": to_json(job.topology),
                "dump": str(folder / "dump"),
            },
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.planning.jobs", str(request), str(answer)],
                env=os.environ | environment(folder / "dump") | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def ended(self) -> bool:
        return self.process.poll() is not None

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def check(self) -> None:
        if self.process.returncode == 0:
            return
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else f"it ended with status {self.process.returncode}"
        raise UserError(last.removeprefix("common.errors.UserError: ")[:500])


def _sources() -> str:
    digest = hashlib.sha256()
    for file in _source_files():
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _source_files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def _work(request: dict[str, Any]) -> Compiled:
    """In a process of its own: the answer to one request."""
    from common.train.programs import check_rows, lower_step, make_programs
    from experiments.running.pipeline import make_setup

    experiment = from_json(Experiment, request["experiment"])
    topology = from_json(Topology, request["topology"])
    setup = make_setup(experiment, experiment.arms[request["arm"]])
    check_rows(setup)
    programs = make_programs(setup, devices_of(topology))
    return compile_step(lambda: lower_step(setup, programs), programs.mesh, topology, Path(request["dump"]))


if __name__ == "__main__":
    path = Path(sys.argv[2])
    part = path.with_name(f".{path.name}.part")
    write_json(part, to_json(_work(read_json(Path(sys.argv[1])))))
    put(part, path)
    os._exit(0)  # the compiler still works in its thread
