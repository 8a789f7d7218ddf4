"""Resuming: an interrupted run ends with the same bits, also after its newest checkpoint is damaged."""

import dataclasses
import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from common.config import to_json
from common.data.batch import HostBatch
from common.errors import UserError
from common.files import read_rows
from common.sharding.shape import MeshShape
from common.train.checkpoints import Checkpoints
from common.train.loop import fit
from common.train.preemption import Preempted
from common.train.run_files import RunFiles
from tests.common.train.runs import STEPS, Unbroken, same_bits, saved_steps
from tests.tiny import (
    EXECUTION,
    Observer,
    Stopped,
    task,
)

# Reading a torn checkpoint leaves coroutines of Orbax unfinished.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


# --- Interruptions


@pytest.mark.parametrize(
    ("family", "stops"),
    [
        pytest.param(family, stops, marks=[] if family == "gpt" or stops == (4, 7) else pytest.mark.slow)
        for family in ("gpt", "t5like")
        for stops in ((2,), (3,), (4, 7), (8,))
    ],
    ids=str,
)
def test_resumed_is_unbroken(
    unbroken: dict[str, Unbroken], family: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    """Runs stopped before the first checkpoint, at one, between two, twice, and before the last end with equal bits."""
    run, recalled = unbroken[family], []

    class Seeker:
        def landmarks(self, step: int) -> tuple[int, ...]:
            return step, 2 * step

        def recall(self, landmarks: Sequence[int]) -> None:
            recalled.append(landmarks)

    for stop in stops:
        with pytest.raises(Stopped):
            fit(dataclasses.replace(run.task, seeker=Seeker()), tmp_path, Observer(stop_at=stop))
    last = Observer()
    recalled.clear()
    fitted = fit(dataclasses.replace(run.task, seeker=Seeker()), tmp_path, last)
    resumed = {2: 0, 3: 0, 7: 6, 8: 6}[stops[-1]]
    assert last.notes == ([f"resuming after step {resumed} of {STEPS}"] if resumed else [])
    assert recalled == ([(resumed, 2 * resumed)] if resumed else [])
    assert last.steps == list(range(resumed + 1, STEPS + 1))
    same_bits(fitted.params, run.fitted.params)
    assert (tmp_path / RunFiles.METRICS).read_bytes() == run.metrics()
    assert [row["step"] for row in read_rows(tmp_path / RunFiles.TIMINGS)] == list(range(1, STEPS + 1))
    timing: dict[str, Any] = {f"{name}_seconds": 0.0 for name in ("train", "data", "checkpoint", "eval")}
    assert fitted.progress.landmarks == (STEPS, 2 * STEPS) and run.fitted.progress.landmarks == ()
    of_both = (dataclasses.replace(each.progress, **timing, landmarks=()) for each in (fitted, run.fitted))
    assert len(set(of_both)) == 1


def test_a_checkpoint_without_source_fingerprint_leaves_the_column_empty(
    unbroken: dict[str, Unbroken], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, restore = unbroken["gpt"], Checkpoints.restore

    def of_an_earlier_version(*args: Any, **named: Any) -> Any:
        if (restored := restore(*args, **named)) is None:
            return None
        return restored[0], dataclasses.replace(restored[1], source_fingerprint=None)

    with pytest.raises(Stopped):
        fit(run.task, tmp_path, Observer(stop_at=4))
    monkeypatch.setattr(Checkpoints, "restore", of_an_earlier_version)
    fit(run.task, tmp_path, Observer())
    rows, whole = (read_rows(folder / RunFiles.METRICS) for folder in (tmp_path, run.folder))
    assert rows == [row if row["step"] <= 3 else {**row, "source_fingerprint": None} for row in whole]
    assert all(row["source_fingerprint"] for row in whole)


@pytest.mark.slow  # compiles for eight devices what others compile for one
def test_resumed_is_unbroken_on_a_mesh(tmp_path: Path) -> None:
    """Every array is restored with its own sharding."""
    sharded = task("gpt", mesh=MeshShape(data=2, fsdp=2, tensor=2))
    whole = fit(sharded, tmp_path / "whole", Observer())
    with pytest.raises(Stopped):
        fit(sharded, tmp_path / "broken", Observer(stop_at=7))
    resumed = fit(sharded, tmp_path / "broken", Observer())
    assert resumed.params["embedding"]["table_VD"].sharding.spec == PartitionSpec("tensor", "fsdp")
    same_bits(resumed.params, whole.params)
    assert (tmp_path / "broken" / RunFiles.METRICS).read_bytes() == (tmp_path / "whole" / RunFiles.METRICS).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "t5like"])
def test_a_run_resumes_on_other_devices(unbroken: dict[str, Unbroken], family: str, tmp_path: Path) -> None:
    """On another mesh, with other accumulation and rematerialisation: the same batches, losses equal up to rounding."""
    run, before = unbroken[family], run_steps(unbroken[family].folder)
    with pytest.raises(Stopped):
        fit(task(family, mesh=MeshShape(data=2, fsdp=2)), tmp_path, Observer(stop_at=7))
    last, execution = Observer(), dataclasses.replace(EXECUTION, remat="full")
    moved = task(family, mesh=MeshShape(context=2, tensor=2), accumulation=2, sharding="sequence", execution=execution)
    fitted = fit(moved, tmp_path, last)
    assert last.steps == [7, 8] and "resuming after step 6 of 8" in last.notes
    changes = ["train.accumulation: 1 -> 2", "train.mesh.data: 2 -> 1", "train.mesh.tensor: 1 -> 2"]
    for change in changes:
        assert f"warning: {change}: results may differ in the last bits" in last.notes
    assert set(changes) < set(read_rows(tmp_path / RunFiles.LAUNCHES)[1]["changed"])
    assert json.loads((tmp_path / RunFiles.CONFIG).read_text())["train"]["mesh"] == to_json(moved.setup.train.mesh)
    after = run_steps(tmp_path)
    assert [row["fingerprint"] for row in after] == [row["fingerprint"] for row in before]
    assert [row["loss"] for row in after] == pytest.approx([row["loss"] for row in before], rel=1e-5)
    for found, expected in zip(jax.tree.leaves(fitted.params), jax.tree.leaves(run.fitted.params), strict=True):
        expected = np.asarray(expected)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def run_steps(folder: Path) -> list[dict[str, Any]]:
    return read_rows(folder / RunFiles.METRICS)


@dataclasses.dataclass
class CtrlC(Observer):
    """An observer whose user interrupts the run."""

    at: int = 4

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        super().step(row, timing)
        if row["step"] == self.at:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_is_saved(unbroken: dict[str, Unbroken], tmp_path: Path) -> None:
    """Saves after the current step, which would not have been saved otherwise, and resumes to the same bits."""
    run, before = unbroken["gpt"], signal.getsignal(signal.SIGINT)
    with pytest.raises(Preempted) as stopped:
        fit(run.task, tmp_path, CtrlC())
    step = stopped.value.step
    assert stopped.value.code == 130 and step in (4, 5) and step in saved_steps(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    observer = Observer()
    same_bits(fit(run.task, tmp_path, observer).params, run.fitted.params)
    assert (
        observer.steps == list(range(step + 1, STEPS + 1))
        and (tmp_path / RunFiles.METRICS).read_bytes() == run.metrics()
    )


def test_a_half_written_row_is_dropped(unbroken: dict[str, Unbroken], tmp_path: Path) -> None:
    run = unbroken["gpt"]
    with pytest.raises(Stopped):
        fit(run.task, tmp_path, Observer(stop_at=5))
    with open(tmp_path / RunFiles.METRICS, "a") as file:
        file.write('{"step": 6, "lo')
    fit(run.task, tmp_path, Observer())
    assert (tmp_path / RunFiles.METRICS).read_bytes() == run.metrics()


class NoStream:
    """A stream that must not be read."""

    content = "none"

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        raise AssertionError("a finished run asked for batches")


def test_a_finished_run_is_skipped(unbroken: dict[str, Unbroken]) -> None:
    run = unbroken["gpt"]
    before, observer = run.metrics(), Observer()
    again = fit(dataclasses.replace(run.task, stream=NoStream()), run.folder, observer)
    same_bits(again.params, run.fitted.params)
    assert again.progress == run.fitted.progress
    assert observer.steps == [] and run.metrics() == before


def test_another_machine_gives_a_warning(unbroken: dict[str, Unbroken], tmp_path: Path) -> None:
    shutil.copytree(unbroken["gpt"].folder, tmp_path / "arm")
    path = tmp_path / "arm" / RunFiles.ENVIRONMENT
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": 1234}))
    observer = Observer()
    fit(unbroken["gpt"].task, tmp_path / "arm", observer)
    assert any(note.startswith("warning: threads was 1234 when this run began") for note in observer.notes)


# --- Damaged checkpoints


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(folder: Path) -> None:
    path = largest(folder / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder: Path) -> None:
    path = largest(folder / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(bytes(data))


CORRUPTIONS = {
    "truncated": truncate,
    "one-bit": flip,
    "emptied": lambda folder: largest(folder / "state").write_bytes(b""),
    "no-state": lambda folder: shutil.rmtree(folder / "state"),
    "no-progress": lambda folder: shutil.rmtree(folder / "progress"),
    "torn-progress": lambda folder: largest(folder / "progress").write_text('{"consumed_ba'),
}


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(
            corrupt, id=name, marks=[] if name in ("one-bit", "no-state", "torn-progress") else pytest.mark.slow
        )
        for name, corrupt in CORRUPTIONS.items()
    ],
)
def test_a_corrupted_checkpoint_is_skipped(
    unbroken: dict[str, Unbroken], corrupt: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = unbroken["gpt"]
    folder = tmp_path / "arm"
    shutil.copytree(run.folder, folder)
    corrupt(folder / RunFiles.CHECKPOINTS / "8")
    observer = Observer()
    fitted = fit(run.task, folder, observer)
    same_bits(fitted.params, run.fitted.params)
    assert (folder / RunFiles.METRICS).read_bytes() == run.metrics()
    assert observer.steps == [7, 8]
    assert any("checkpoint 8" in message and "trying the one before" in message for message in caplog.messages)
    assert fit(run.task, folder, Observer()).progress == fitted.progress


def test_no_good_checkpoint_is_an_error(unbroken: dict[str, Unbroken], tmp_path: Path) -> None:
    folder = tmp_path / "arm"
    shutil.copytree(unbroken["gpt"].folder, folder)
    for step in saved_steps(folder):
        truncate(folder / RunFiles.CHECKPOINTS / str(step))
    with pytest.raises(UserError, match="none of the checkpoints in .* can be read"):
        fit(unbroken["gpt"].task, folder, Observer())
