"""A study in a pool of workers: killed at any moment and resumed, it ends as the same study in one process."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.files import read_json
from tests.experiments.tiny_study import write_data

ROOT = Path(__file__).parents[3]
STUDY = """
import dataclasses
from pathlib import Path
from experiments.search import Search
from tests.experiments.tiny_study import tiny_study

def study():
    search = Search(rates=(5e-3, 1e-2, 2e-2), extend=0)
    return dataclasses.replace(tiny_study(Path({folder!r})), seeds=2, search=search)
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    path = folder / "reversing.py"
    path.write_text(STUDY.format(folder=str(folder)))
    return path


def launch(study: Path, run_dir: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.cli", "run", str(study), "--run-dir", str(run_dir), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def losses(run_dir: Path) -> dict[str, float]:
    listed = read_json(run_dir / "runs.json")
    return {
        row["name"]: json.loads((run_dir / row["folder"] / "result.json").read_text())["validation_loss"]
        for row in listed["runs"]
    }


def workers_of(run_dir: Path) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"--worker" in command and str(run_dir).encode() in command:
            found.append(int(folder.name))
    return found


@pytest.mark.slow  # trains 8 small models, three times in part
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are assigned on Linux only")
def test_a_pool_that_is_killed_at_any_moment_ends_as_one_process_does(study: Path, tmp_path: Path) -> None:
    alone, pooled = tmp_path / "alone", tmp_path / "pooled"
    core = {min(os.sched_getaffinity(0))}
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, core)  # inherited: sums in one thread have the bits of a worker's
    try:
        serial = launch(study, alone)
    finally:
        os.sched_setaffinity(0, before)
    finish(serial)

    dice = random.Random(0)
    for signal_, of_worker in ((signal.SIGKILL, True), (signal.SIGKILL, False), (signal.SIGTERM, False)):
        process = launch(study, pooled, "--jobs", "2")
        time.sleep(dice.uniform(8, 25))
        victims = workers_of(pooled)[:1] if of_worker else [process.pid]
        for victim in victims:
            os.kill(victim, signal_)
        if of_worker:
            time.sleep(3)
            process.terminate()
        process.communicate(timeout=120)
        for _ in range(300):  # the kernel tells workers of a parent's end; each saves its run first
            if not workers_of(pooled):
                break
            time.sleep(0.1)
        assert not workers_of(pooled)
    output = finish(launch(study, pooled, "--jobs", "2"))

    assert losses(pooled) == losses(alone) and len(losses(alone)) == 2 * 3 + 2
    assert "report:" in output
    again = finish(launch(study, pooled, "--jobs", "2"))
    assert "8 of 8 runs are done" in again
    assert not list(pooled.glob("*/failure.json"))


@pytest.mark.slow  # three starts of Python with JAX
def test_what_every_worker_refuses_is_one_error(study: Path, tmp_path: Path) -> None:
    process = launch(study, tmp_path / "refused", 'evaluation.splits=["tset"]', "--jobs", "2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert output.strip().splitlines()[-1].startswith("twinstack: error: ") and "tset" in output
