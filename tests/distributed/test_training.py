"""Training by several real processes: equal to one process, one of them writes, and a lost one ends the others."""

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from common.files import read_rows
from common.sharding.shape import MeshShape
from common.train.checkpoints import Checkpoints
from common.train.programs import make_programs
from common.train.run_files import RunFiles
from common.train.state import abstract_state
from experiments.running.pipeline import make_setup
from tests.distributed.launch import Job, flags, launched
from tests.experiments.tiny_study import STEPS, tiny_run, with_train, write_data

pytestmark = pytest.mark.slow  # several processes that compile, each test
MEASURED = ("loss", "grad_norm", "validation_loss")
HEARTBEAT_SECONDS = 10
"""Less than the real one, so that the tests do not wait for a minute."""
STOPPED = 120
"""Seconds within which the other processes must stop."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write_data(path)
    return path


@contextlib.contextmanager
def training(
    folder: Path,
    run_dir: Path,
    arm: str,
    mesh: MeshShape,
    count: int,
    *,
    scored: bool = False,
    last: tuple[str, ...] = (),
) -> Iterator[Job]:
    """Trains `arm` with `count` processes; only the last one gets the arguments `last`."""
    command = ["run", "tiny", f"arm={arm}", "--run-dir", str(run_dir)]
    command += [] if scored else ["evaluation.splits=[]"]
    command += [f"train.mesh.{field.name}={getattr(mesh, field.name)}" for field in dataclasses.fields(mesh)]
    arguments = [[str(folder), str(HEARTBEAT_SECONDS), *command, *flag] for flag in flags(count)]
    arguments[-1] += last
    logs = run_dir.with_name(f"{run_dir.name}.logs{time.monotonic_ns()}")
    devices = mesh.devices // count
    with launched(["tests.distributed.program"], arguments, devices=devices, cache=folder / "cache", logs=logs) as job:
        yield job


def trained(folder: Path, run_dir: Path, arm: str, mesh: MeshShape, count: int, *, scored: bool = False) -> Job:
    with training(folder, run_dir, arm, mesh, count, scored=scored) as job:
        assert job.wait() == [0] * count, job.everything()
    return job


def rows_written(run_dir: Path, arm: str) -> int:
    path = run_dir / arm / RunFiles.METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def final_state(folder: Path, run_dir: Path, arm: str, mesh: MeshShape) -> list[np.ndarray]:
    """Returns all arrays of the last checkpoint, read onto `mesh` by this process."""
    run = with_train(tiny_run(folder, arm), mesh=mesh)
    made = make_programs(make_setup(run))
    abstract = abstract_state(made.model, made.optimizer, made.shardings)
    with contextlib.closing(Checkpoints(run_dir / arm / RunFiles.CHECKPOINTS, keep_last=2)) as found:
        restored = found.restore(abstract, seed=run.train.seed)
    assert restored is not None and restored[1].consumed_batches == STEPS
    arrays = jax.tree.leaves(restored[0])
    assert all(array.sharding.device_set == set(made.mesh.devices.flat) for array in arrays)
    return [np.asarray(array) for array in arrays]


@pytest.mark.parametrize(
    ("arm", "mesh", "count"),
    [
        ("gpt", MeshShape(data=2, fsdp=2), 2),
        ("t5like", MeshShape(data=2, tensor=2), 4),  # two and two processes feed the same rows
        ("gpt", MeshShape(fsdp=4), 4),
    ],
    ids=["2", "4-same-rows", "4"],
)
def test_several_train_what_one_does(folder: Path, tmp_path: Path, arm: str, mesh: MeshShape, count: int) -> None:
    """Losses agree to 1e-6, counts and decoded texts exactly; only the first process writes and prints."""
    one, several = tmp_path / "one" / "run", tmp_path / "several" / "run"  # neighbours would share the run
    trained(folder, one, arm, mesh, 1, scored=True)
    job = trained(folder, several, arm, mesh, count, scored=True)
    a, b = (read_rows(run_dir / arm / RunFiles.METRICS) for run_dir in (one, several))
    assert len(a) == len(b) == STEPS
    for x, y in zip(a, b, strict=True):
        assert {k: v for k, v in x.items() if k not in MEASURED} == {k: v for k, v in y.items() if k not in MEASURED}
        assert set(x) == set(y)
        for name in set(MEASURED) & set(x):
            assert x[name] == pytest.approx(y[name], rel=1e-6, abs=0)
    samples = [read_rows(run_dir / arm / RunFiles.SAMPLES) for run_dir in (one, several)]
    assert samples[0] == samples[1] and len(samples[0]) == 8
    assert json.loads((several / arm / RunFiles.ENVIRONMENT).read_text())["processes"] == count

    mine = [f"writes {several}", f"writes {several.resolve()}"]
    written = [
        [
            line
            for line in job.output(i).splitlines()
            if line.startswith(tuple(mine)) and RunFiles.CHECKPOINTS not in line
        ]
        for i in range(count)
    ]
    assert {Path(line).name for line in written[0]} >= {RunFiles.METRICS, RunFiles.TIMINGS, RunFiles.LOCK}
    assert not any(written[1:]), written[1:]
    assert "gpt: " in job.output(0) or "t5like: " in job.output(0)
    assert not any(f"{arm}: " in job.output(i) for i in range(1, count))

    # What four processes saved, one process reads onto 1, 2 and 8 devices.
    shapes = (MeshShape(), MeshShape(tensor=2), MeshShape(data=2, fsdp=2, tensor=2))
    found = [final_state(folder, several, arm, shape) for shape in shapes]
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a function that trains an arm to the end with two processes of two devices, once."""
    made: dict[str, Path] = {}

    def run(arm: str) -> Path:
        if arm not in made:
            made[arm] = tmp_path_factory.mktemp(arm) / "unbroken"
            trained(folder, made[arm], arm, PAIR, 2)
        return made[arm]

    return run


PAIR = MeshShape(data=2, fsdp=2)


def check_resumed(folder: Path, broken: Path, unbroken: Path, arm: str, at: set[int]) -> None:
    """Asserts that the same command resumes from a checkpoint and ends with the results of the unbroken run."""
    job = trained(folder, broken, arm, PAIR, 2)
    assert any(f"resuming after step {step} of {STEPS}\n" in job.output(0) for step in at), job.everything()
    a, b = ((run_dir / arm / RunFiles.METRICS).read_bytes() for run_dir in (broken, unbroken))
    assert a == b
    result, expected = (json.loads((run_dir / arm / RunFiles.RESULT).read_text()) for run_dir in (broken, unbroken))
    timed = {"train_seconds", "tokens_per_second", "data_wait_share"}
    assert {k: v for k, v in result.items() if k not in timed} == {k: v for k, v in expected.items() if k not in timed}


@pytest.mark.parametrize(
    ("arm", "victim", "said"),
    [("gpt", 1, "process 1 was lost"), ("t5like", 0, "process 0, or the connection to it, was lost")],
)
def test_one_is_killed(
    folder: Path,
    tmp_path: Path,
    unbroken: Callable[[str], Path],
    arm: str,
    victim: int,
    said: str,
) -> None:
    broken = tmp_path / "broken"
    with training(folder, broken, arm, PAIR, 2) as job:
        job.wait_until(lambda: rows_written(broken, arm) >= 13)
        job.processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        statuses = job.wait(STOPPED)
        print(f"the other stopped after {time.monotonic() - killed:.1f} s")
        assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] != 0
        assert f"twinstack: error: {said}" in last_line(job, 1 - victim), job.everything()
    check_resumed(folder, broken, unbroken(arm), arm, {5, 10, 15})


def last_line(job: Job, index: int) -> str:
    """Returns the last line of a process's output; waits, since its standard error is copied by another process."""
    time.sleep(1)
    return job.output(index).rstrip().splitlines()[-1]


@pytest.mark.parametrize(("arm", "to"), [("gpt", (0, 1)), ("t5like", (1,))], ids=["all", "one"])
def test_asked_to_end_all_save_the_same_step(
    folder: Path, tmp_path: Path, unbroken: Callable[[str], Path], arm: str, to: tuple[int, ...]
) -> None:
    broken = tmp_path / "broken"
    with training(folder, broken, arm, PAIR, 2) as job:
        job.wait_until(lambda: rows_written(broken, arm) >= 3)
        asked = time.monotonic()
        for index in to:
            job.processes[index].send_signal(signal.SIGTERM)
        assert job.wait(30) == [128 + signal.SIGTERM] * 2, job.everything()
        print(f"all ended {time.monotonic() - asked:.1f} s after they were asked to")
    saved = rows_written(broken, arm)
    assert 3 <= saved < STEPS
    assert f"terminated, step {saved} is saved" in job.output(0)
    check_resumed(folder, broken, unbroken(arm), arm, {saved})


def test_one_process_resumes_a_run_of_two(folder: Path, tmp_path: Path, unbroken: Callable[[str], Path]) -> None:
    """On other devices in another mesh: the same batches, and losses equal up to rounding."""
    broken = tmp_path / "broken"
    with training(folder, broken, "gpt", PAIR, 2) as job:
        job.wait_until(lambda: rows_written(broken, "gpt") >= 3)
        job.processes[0].send_signal(signal.SIGTERM)
        assert job.wait(30) == [128 + signal.SIGTERM] * 2, job.everything()
    job = trained(folder, broken, "gpt", MeshShape(fsdp=4, tensor=2), 1)
    assert "train.mesh.tensor: 1 -> 2: results may differ" in " ".join(job.output(0).split()), job.everything()
    a, b = (read_rows(run_dir / "gpt" / RunFiles.METRICS) for run_dir in (broken, unbroken("gpt")))
    for name in ("fingerprint", "source_fingerprint"):
        assert [row[name] for row in a] == [row[name] for row in b]
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], rel=1e-5)


@pytest.mark.parametrize(
    ("override", "shown"),
    [("train.seed=1", "train.seed: 0 -> 1"), ("train.validate_every=7", "train.validate_every: ")],
)
def test_another_config_in_one_stops_all(override: str, shown: str, folder: Path, tmp_path: Path) -> None:
    """Also one that changes no result: processes that validate at different steps would wait for each other."""
    with training(folder, tmp_path / "run", "gpt", PAIR, 2, last=(override,)) as job:
        assert job.wait() == [2, 2], job.everything()
    for index in range(2):
        assert "error: process 1 was about to train something else" in job.output(index)
    assert shown in job.output(1)


def test_a_run_directory_that_is_not_shared_is_refused(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    with training(folder, tmp_path / "run", "gpt", PAIR, 2, last=("--run-dir", str(alone))) as job:
        assert job.wait() == [2, 2], job.everything()
    assert all("error: process 1 does not see" in job.output(index) for index in range(2))
    assert not alone.exists()


def test_an_error_in_one_ends_the_other(folder: Path, tmp_path: Path) -> None:
    """One process does not find its data and reports that; the other reports that it ended."""
    with training(folder, tmp_path / "run", "gpt", PAIR, 2, last=(f"data.source.name=jsonl:{tmp_path}/x",)) as job:
        began = time.monotonic()
        assert all(status != 0 for status in job.wait(STOPPED)), job.everything()
        print(f"both ended within {time.monotonic() - began:.1f} s")
    assert "error: " in job.output(1) and str(tmp_path / "x") in job.output(1)
    assert "process 1 ended before the others" in last_line(job, 0), job.everything()
