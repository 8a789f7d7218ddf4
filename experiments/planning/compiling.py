"""Compiles training steps for other machines: one process for each step, with the results kept in the cache.

This module is also the program of such a process: `python -m experiments.planning.compiling REQUEST.json RESULT.json`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from common.compute.aot import Compiled, compile_step, devices_of, environment
from common.compute.topology import Topology
from common.config import from_json, to_json
from common.data.cache import default_cache_dir, put, warn_of_damage, whole
from common.errors import UserError
from common.files import read_json, write_json
from common.terminal import marked_up
from experiments.families import FAMILIES
from experiments.run import Run

ROOT = Path(__file__).parents[2]
PACKAGES = ("common", "experiments", *(family.kind for family in FAMILIES))
"""Packages whose modules a compiled step may depend on."""
STEP_FIELDS = ("optimizer", "accumulation", "mesh", "sharding", "execution", "anomalies")
"""Fields of a run's config `train` that a compiled step depends on; seed, rate and schedule are its arguments."""
PROCESSES = 2
"""How many compile at once; each takes one core and some GB of memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedProgram:
    """The training step of a run, to compile for a topology; the run's mesh has the topology's devices."""

    name: str
    """Its arm, in messages."""
    run: Run
    topology: Topology

    def key(self) -> str:
        """Returns a hash of everything that the compiled program depends on: its name in the cache."""
        model, train = to_json(self.run.model), to_json(self.run.train)
        fields = [train[name] for name in STEP_FIELDS]
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu", "flax", "optax")}
        parts = [model, fields, self.run.row_slots, str(self.topology), versions, _source_hash()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def compile_all(programs: Sequence[PlannedProgram], console: Console) -> list[Compiled]:
    """Returns the results in order, from the cache where possible; prints which programs it compiles.

    Equal programs are compiled once.

    Raises UserError if libtpu is not installed, and with the last line of a compiler's output if it fails.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, the compiler for TPUs, is not installed; it needs no TPU: pip install 'twinstack[plan]'"
        )
    paths = [default_cache_dir() / "plans" / f"{program.key()}.json" for program in programs]
    missing: dict[Path, PlannedProgram] = {}
    for program, path in zip(programs, paths, strict=True):
        if path not in missing and not whole(path):
            missing[path] = program
    for path in missing:
        warn_of_damage(path)
    if missing:
        _compile_missing(missing, console)
    return [from_json(Compiled, read_json(path)) for path in paths]


def _compile_missing(missing: Mapping[Path, PlannedProgram], console: Console) -> None:
    """Runs PROCESSES compilers at a time until every file is written; ends all of them if one fails."""
    started = time.perf_counter()
    status: contextlib.AbstractContextManager[Status | None] = (
        console.status("") if console.is_terminal else contextlib.nullcontext()
    )
    with tempfile.TemporaryDirectory(prefix="twinstack-plan-") as folder, contextlib.ExitStack() as stack:
        shown = stack.enter_context(status)
        waiting, running = list(missing.items()), list[_Compiler]()
        while waiting or running:
            while waiting and len(running) < PROCESSES:
                path, program = waiting.pop(0)
                mesh = program.run.train.mesh
                console.print(marked_up(f"compiling {program.name} for {program.topology}, mesh {mesh}"))
                compiler = _Compiler(program, path, Path(folder) / path.stem)
                stack.callback(compiler.kill)
                running.append(compiler)
            time.sleep(0.1)
            for compiler in [compiler for compiler in running if compiler.has_ended()]:
                running.remove(compiler)
                compiler.check()
                console.print(f"{marked_up(compiler.program.name)}: {compiler.seconds():.0f} s")
            if shown is not None:
                arms = ", ".join(compiler.program.name for compiler in running)
                shown.update(marked_up(f"compiling {arms}: {time.perf_counter() - started:.0f} s"))


class _Compiler:
    """A process that compiles one program and writes the result to `result`; `folder` takes its files."""

    def __init__(self, program: PlannedProgram, result: Path, folder: Path):
        self.program, self.started = program, time.perf_counter()
        folder.mkdir(parents=True)
        result.parent.mkdir(parents=True, exist_ok=True)
        request, self.log = folder / "request.json", folder / "log.txt"
        write_json(
            request,
            {
                "run": to_json(program.run),
                "topology": to_json(program.topology),
                "dump": str(folder / "dump"),
            },
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.planning.compiling", str(request), str(result)],
                env=os.environ | environment(folder / "dump") | {"PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def check(self) -> None:
        """Raises UserError with the last line of the output if the process failed."""
        if self.process.returncode == 0:
            return
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else f"the compiler's process ended with status {self.process.returncode}"
        raise UserError(last.removeprefix("common.errors.UserError: ")[:500])


@functools.cache
def _source_hash() -> str:
    """Returns a hash of the source files of PACKAGES."""
    digest = hashlib.sha256()
    for file in _source_files():
        digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _source_files() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def _compile_request(request: dict[str, Any]) -> Compiled:
    """Compiles what `_Compiler` asks for; runs in the compiler's process."""
    from common.train.programs import check_rows, lower_step, make_programs
    from experiments.running.pipeline import make_setup

    topology = from_json(Topology, request["topology"])
    setup = make_setup(from_json(Run, request["run"]))
    check_rows(setup)
    programs = make_programs(setup, devices_of(topology))
    return compile_step(lambda: lower_step(setup, programs), programs.mesh, topology, Path(request["dump"]))


if __name__ == "__main__":
    path = Path(sys.argv[2])
    part = path.with_name(f".{path.name}.part")
    write_json(part, to_json(_compile_request(read_json(Path(sys.argv[1])))))
    put(part, path)
    os._exit(0)  # does not wait for the compiler's thread, which goes on
