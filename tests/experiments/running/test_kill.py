"""A run that is killed at any moment, with SIGKILL or SIGTERM, and resumed ends with the bits of an unbroken one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.files import read_rows
from common.train.checkpoints import Checkpoints
from common.train.programs import make_programs
from common.train.run_files import RunFiles
from common.train.state import abstract_state
from experiments.running.pipeline import make_setup
from tests.experiments.tiny_study import STEPS, tiny_run, write_data

ROOT = Path(__file__).parents[3]
PATIENCE = 120
"""Seconds that a start may take on a busy machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_data(path)
    return path


@contextlib.contextmanager
def launched(folder: Path, arm: str, *run_dirs: Path) -> Iterator[subprocess.Popen[str]]:
    with program("tiny_study", folder, arm, *run_dirs) as process:
        yield process


@contextlib.contextmanager
def program(name: str, folder: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Starts a module of `tests.experiments` on one device, with the compile cache of this session."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", f"tests.experiments.{name}", str(folder), *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def killed(folder: Path, arm: str, run_dir: Path, now: Callable[[], bool]) -> bool:
    """Launches a run and kills it once it trains and `now()` is true; returns False if it finished before that."""
    with launched(folder, arm, run_dir) as process:
        assert process.stdout is not None and any(line == "begin\n" for line in process.stdout)
        give_up = time.monotonic() + PATIENCE
        while not now() and process.poll() is None:
            assert time.monotonic() < give_up
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def finished(folder: Path, arm: str, *run_dirs: Path) -> str:
    with launched(folder, arm, *run_dirs) as process:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        return output


def final_state(folder: Path, arm: str, run_dir: Path) -> Any:
    """Returns the arrays of the last checkpoint: parameters, optimizer, step."""
    run = tiny_run(folder, arm)
    made = make_programs(make_setup(run))
    abstract = abstract_state(made.model, made.optimizer, made.shardings)
    with contextlib.closing(Checkpoints(run_dir / arm / RunFiles.CHECKPOINTS, keep_last=run.train.keep_last)) as found:
        restored = found.restore(abstract, seed=run.train.seed)
    assert restored is not None and restored[1].consumed_batches == STEPS
    return jax.tree.map(np.asarray, restored[0])


def check_same(folder: Path, arm: str, broken: Path, unbroken: Path) -> None:
    a, b = ((run_dir / arm / RunFiles.METRICS).read_bytes() for run_dir in (broken, unbroken))
    assert a == b and a.count(b"\n") == STEPS
    states = [jax.tree.leaves(final_state(folder, arm, run_dir)) for run_dir in (broken, unbroken)]
    for x, y in zip(*states, strict=True):
        np.testing.assert_array_equal(x, y)
    steps = [row["step"] for row in read_rows(broken / arm / RunFiles.TIMINGS)]
    assert steps == list(range(1, STEPS + 1))


def rows_written(run_dir: Path, arm: str, count: int) -> bool:
    path = run_dir / arm / RunFiles.METRICS
    return path.exists() and path.read_bytes().count(b"\n") >= count


def checkpoint_begun(run_dir: Path, arm: str, step: int) -> bool:
    """Whether the checkpoint's folder exists, under its temporary or its final name."""
    path = run_dir / arm / RunFiles.CHECKPOINTS
    return path.exists() and any(entry.name.split(".")[0] == str(step) for entry in path.iterdir())


def check_resumed(output: str, at: tuple[int, ...]) -> None:
    assert any(f"resuming after step {step} of {STEPS}\n" in output for step in at), output


@pytest.mark.slow  # starts many runs
def test_killed_between_checkpoints(folder: Path, tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    assert killed(folder, "gpt", broken, lambda: rows_written(broken, "gpt", 13))
    # Step 10's checkpoint may still have been on its way; it was begun, so step 5's was whole.
    check_resumed(finished(folder, "gpt", broken, unbroken), (5, 10, 15))
    check_same(folder, "gpt", broken, unbroken)


@pytest.mark.slow  # starts many runs
def test_killed_while_a_checkpoint_is_written(folder: Path, tmp_path: Path) -> None:
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    assert killed(folder, "t5like", broken, lambda: checkpoint_begun(broken, "t5like", 25))
    check_resumed(finished(folder, "t5like", broken, unbroken), (20, 25))
    check_same(folder, "t5like", broken, unbroken)


@pytest.mark.slow
def test_sigterm_saves_the_current_step(folder: Path, tmp_path: Path) -> None:
    arm, broken, unbroken = "t5like", tmp_path / "broken", tmp_path / "unbroken"
    with launched(folder, arm, broken) as process:
        assert process.stdout is not None and any(line == "begin\n" for line in process.stdout)
        give_up = time.monotonic() + PATIENCE
        while not rows_written(broken, arm, 7):
            assert time.monotonic() < give_up and process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM
    saved = (broken / arm / RunFiles.METRICS).read_bytes().count(b"\n")
    assert 7 <= saved < STEPS
    check_resumed(finished(folder, arm, broken, unbroken), (saved,))
    check_same(folder, arm, broken, unbroken)


@pytest.mark.slow  # 50 launches of a run
@pytest.mark.parametrize(("arm", "seed"), [("gpt", 0), ("t5like", 1)])
def test_many_kills(folder: Path, arm: str, seed: int, tmp_path: Path) -> None:
    """Kills each arm 25 times by SIGKILL or SIGTERM, anywhere and during saves: all runs end with the same bits."""
    kills, broken, unbroken = 25, tmp_path / "broken", tmp_path / "unbroken"
    finished(folder, arm, unbroken)
    with program("running.chaos", folder, arm, broken, kills, seed) as process:
        output, _ = process.communicate(timeout=10 * PATIENCE)
        assert process.returncode == 0, output
    launches = [json.loads(line) for line in output.splitlines()]
    ends = Counter((launch["signal"], launch["status"]) for launch in launches if launch["status"])
    assert ends.total() == kills and ends["SIGKILL", -signal.SIGKILL] > 5 and ends["SIGTERM", 128 + signal.SIGTERM] > 5
    assert ends["SIGTERM", -signal.SIGTERM] <= 2  # when a run was over, and only its process was left
    assert len(ends) <= 3
    assert all(launch["seconds"] < 30 for launch in launches if launch["signal"] == "SIGTERM")
    runs = {launch["run"] for launch in launches}
    for run in runs:
        check_same(folder, arm, broken / str(run), unbroken)
