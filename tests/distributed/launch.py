"""Starts real processes on this machine, each with its own devices; none outlives its test."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 240
"""Seconds to wait for anything on a busy machine."""


@dataclasses.dataclass(frozen=True)
class Job:
    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def output(self, index: int) -> str:
        """Returns what process `index` has written so far, to either stream."""
        return self.logs[index].read_text(errors="replace")

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Waits for all processes and returns their exit statuses."""
        give_up = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, give_up - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.everything()) from None

    def wait_until(self, now: Callable[[], bool]) -> None:
        """Waits until `now` returns True; fails if a process ends before."""
        give_up = time.monotonic() + PATIENCE
        while not now():
            alive = all(process.poll() is None for process in self.processes)
            assert alive and time.monotonic() < give_up, self.everything()
            time.sleep(0.01)

    def everything(self) -> str:
        return "\n".join(f"--- process {index}\n{self.output(index)}" for index in range(len(self.logs)))


@contextlib.contextmanager
def launched(
    program: Sequence[str], arguments: Sequence[Sequence[str]], *, devices: int, cache: Path, logs: Path
) -> Iterator[Job]:
    """Runs `python -m program` once per entry of `arguments`, each with `devices` CPU devices."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "TWINSTACK_CACHE": str(cache),
    }
    logs.mkdir(parents=True, exist_ok=True)
    job = Job([], [logs / f"{index}.log" for index in range(len(arguments))])
    try:
        for given, log in zip(arguments, job.logs, strict=True):
            command = [sys.executable, "-m", *program, *given]
            with open(log, "wb") as output:
                started = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            job.processes.append(started)
        yield job
    finally:
        for process in job.processes:
            process.kill()
        for process in job.processes:
            process.wait()


def flags(count: int) -> list[list[str]]:
    """Returns the flags that join `count` processes at a free port of this machine."""
    if count == 1:
        return [["--processes", "1"]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        ["--coordinator", coordinator, "--processes", str(count), "--process", str(index)] for index in range(count)
    ]
