"""Studies on a Ray cluster: resources and mistakes; and, slow, a cluster of two workers of which one is killed."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.sharding.shape import MeshShape
from common.train.run_files import RunFiles
from experiments.running import on_ray
from experiments.running.study_folder import StudyFolder
from tests.experiments.tiny_study import tiny_run, tiny_study, with_train

ROOT = Path(__file__).parents[3]
PATIENCE = 240
"""Seconds that anything may take on a busy machine."""
RUNS = ("gpt", "gpt-s1", "t5like", "t5like-s1")
STEPS = 600
STUDY = f"""
import dataclasses
from pathlib import Path

from common.train.config import Budget
from tests.experiments.tiny_study import tiny_study, with_train


def study():
    longer = lambda run: with_train(run, budget=Budget(unit="steps", amount={STEPS}), checkpoint_every=20)
    return dataclasses.replace(tiny_study(Path(__file__).parent).edited(longer), seeds=2)
"""
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
for _ in range(2):
    cluster.add_node(num_cpus=1)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
"""A cluster of two worker machines with a core each, until standard input is closed."""


@pytest.mark.parametrize(
    ("cluster", "devices", "expected"),
    [
        ({"CPU": 8.0}, 1, {"num_cpus": 1}),
        ({"CPU": 8.0, "GPU": 8.0}, 4, {"num_cpus": 1, "num_gpus": 4}),
        ({"CPU": 8.0, "TPU": 8.0}, 4, {"num_cpus": 1, "resources": {"TPU": 4}}),
        ({"CPU": 8.0, "GPU": 0.0}, 1, {"num_cpus": 1}),
    ],
)
def test_a_run_gets_a_core_or_the_devices_of_its_mesh(
    tmp_path: Path, cluster: dict[str, float], devices: int, expected: dict[str, Any]
) -> None:
    run = with_train(tiny_run(tmp_path), mesh=MeshShape(data=devices))
    assert on_ray.resources(run, cluster) == expected


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install 'twinstack\\[ray\\]'"):
        on_ray.run_on_ray(StudyFolder(tmp_path, tiny_study(tmp_path)), ["gpt"])


def test_a_machine_without_the_shared_folder_says_so(tmp_path: Path) -> None:
    order = {"path": str(tmp_path / "study"), "working_folder": str(Path.cwd()), "on_cpu": True}
    assert re.search(r"does not have .*/study: machines must share", on_ray.check(json.dumps(order)))
    order["working_folder"] = str(tmp_path / "elsewhere")
    assert re.search(r"elsewhere'?: machines must share", on_ray.check(json.dumps(order)))


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TWINSTACK_CACHE": str(folder / "cache"),
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study's file and its data, and in `serial` the results of one process on one core.

    Each launch has a parent folder of its own: a study takes finished runs from its neighbours.
    """
    from tests.experiments.tiny_study import write_data

    path = tmp_path_factory.mktemp("study")
    write_data(path)
    (path / "tiny.py").write_text(STUDY)
    command = [sys.executable, "-m", "experiments.cli", "run", "tiny.py", "--run-dir", "serial/tiny"]
    core = sorted(os.sched_getaffinity(0))[:1]
    subprocess.run(
        command, cwd=path, env=environment(path), check=True, preexec_fn=lambda: os.sched_setaffinity(0, core)
    )
    return path


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[str]:
    """The address of a cluster of two worker machines."""
    pytest.importorskip("ray")
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env=environment(folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        yield next(line for line in process.stdout if re.fullmatch(r"[\d.]+:\d+\n", line)).strip()
        process.stdin.close()
        process.wait(PATIENCE)


@contextlib.contextmanager
def on_cluster(folder: Path, cluster: str, run_dir: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "experiments.cli", "run", "tiny.py", "--on", "ray", "--run-dir", run_dir]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder, RAY_ADDRESS=cluster),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    give_up = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < give_up and process.poll() is None
        time.sleep(0.001)


def steps_written(run_dir: Path) -> int:
    path = run_dir / RunFiles.METRICS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def worker_of(study_dir: Path, run: str) -> int:
    """Returns the process that began a run, which the log of that process names."""
    [log] = [path for path in (study_dir / "workers").iterdir() if f"{run}: compiling" in path.read_text()]
    return int(log.stem.rpartition("-")[2])


def check_same(folder: Path, run_dir: str) -> None:
    """Checks that each run has the bits of the serial one: both compute on one core."""
    for run in RUNS:
        found, serial = folder / run_dir / run, folder / "serial/tiny" / run
        assert (found / RunFiles.METRICS).read_bytes() == (serial / RunFiles.METRICS).read_bytes()
        results = [json.loads((path / RunFiles.RESULT).read_text()) for path in (found, serial)]
        for name in ("validation_loss", "train_loss", "fingerprint", "scores"):
            assert results[0][name] == results[1][name]


@pytest.mark.slow  # starts a cluster
def test_a_killed_workers_run_resumes_elsewhere(folder: Path, cluster: str) -> None:
    study_dir = folder / "killed/tiny"
    with on_cluster(folder, cluster, "killed/tiny") as process:
        wait_for(lambda: 100 < steps_written(study_dir / "gpt") < STEPS, process)
        os.kill(worker_of(study_dir, "gpt"), signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    logs = [path.read_text() for path in (study_dir / "workers").iterdir()]
    assert any(re.search(rf"gpt: resuming after step \d+ of {STEPS}", log) for log in logs), logs
    assert "Parity certificate" in output and (study_dir / "report.html").exists()
    check_same(folder, "killed/tiny")


@pytest.mark.slow
def test_an_interrupted_launch_saves_its_runs(folder: Path, cluster: str) -> None:
    study_dir = folder / "interrupted/tiny"
    with on_cluster(folder, cluster, "interrupted/tiny") as process:
        wait_for(lambda: 100 < steps_written(study_dir / "gpt") < STEPS, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "every run is saved" in output, output
    saved = steps_written(study_dir / "gpt")
    assert 100 <= saved < STEPS
    with on_cluster(folder, cluster, "interrupted/tiny") as process:
        output, _ = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, output
    logs = [path.read_text() for path in (study_dir / "workers").iterdir()]
    assert any(f"gpt: resuming after step {saved} of {STEPS}" in log for log in logs), logs
    check_same(folder, "interrupted/tiny")


@pytest.mark.slow
def test_a_mistake_is_one_line_before_anything_is_trained(folder: Path, cluster: str) -> None:
    (folder / "wrong.py").write_text(STUDY.replace("Path(__file__).parent", "Path('/nowhere')"))
    command = [sys.executable, "-m", "experiments.cli", "run", "wrong.py", "--on", "ray", "--run-dir", "wrong"]
    found = subprocess.run(
        command, cwd=folder, env=environment(folder, RAY_ADDRESS=cluster), capture_output=True, text=True
    )
    assert found.returncode == 2
    assert re.match(r"twinstack: error: .*/nowhere/", found.stderr) and found.stderr.count("\n") == 1
    assert not (folder / "wrong" / "gpt").exists()
