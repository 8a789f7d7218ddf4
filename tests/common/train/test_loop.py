"""The loop and its run directory: what is recorded, resumed, refused and kept."""

import dataclasses
import gc
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from common.compute.length_sums import LengthSums
from common.config import to_json
from common.data.batch import HostBatch
from common.data.loader import chain
from common.errors import UserError
from common.files import read_rows
from common.report.certificate import certify
from common.report.results import ArmResult, Flops
from common.sharding.shape import MeshShape
from common.train import run_dir as rd
from common.train.config import Budget
from common.train.environment import MACHINE_KEYS
from common.train.loop import Fitted, fit
from common.train.preemption import Preempted
from common.train.run_files import RunFiles
from common.train.schema import SCHEMA_VERSION
from common.train.task import Stream, Task
from tests.tiny import (
    DATA,
    EXECUTION,
    INPUTS,
    ROWS,
    TARGETS,
    Observer,
    Stopped,
    loader,
    task,
    tiny,
)

ROOT = Path(__file__).parents[3]
STEPS = 8
families = pytest.mark.parametrize("family", ["gpt", "t5like"])
# Reading a torn checkpoint leaves coroutines of Orbax's unfinished.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unbroken:
    task: Task
    folder: Path
    fitted: Fitted
    observer: Observer

    def metrics(self) -> bytes:
        return (self.folder / RunFiles.METRICS).read_bytes()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Unbroken]:
    """One run to the end for each family, which broken ones are compared with."""
    made = {}
    for family in ("gpt", "t5like"):
        folder, observer, of = tmp_path_factory.mktemp(family) / "arm", Observer(), task(family)
        made[family] = Unbroken(task=of, folder=folder, fitted=fit(of, folder, observer), observer=observer)
    return made


def same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved_steps(folder: Path) -> set[int]:
    return {int(path.name) for path in (folder / RunFiles.CHECKPOINTS).iterdir() if path.name.isdigit()}


# --- What is recorded


@families
def test_metrics_are_complete(unbroken: dict[str, Unbroken], family: str) -> None:
    """One row a step; counts and fingerprints are those of the loader's own batches, added up anew."""
    run = unbroken[family]
    rows = read_rows(run.folder / RunFiles.METRICS)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) == run.observer.steps
    stream = loader()
    fingerprint, examples, tokens, loss_tokens = stream.content, 0, 0, 0
    flops = run.task.setup.model.flops(LengthSums.of_rows(ROWS, INPUTS, TARGETS)).train_full_attention
    for row in rows:
        host = stream.batch(row["step"] - 1)
        segments = np.concatenate([host.batch.input_segments_BI, host.batch.target_segments_BT], axis=1)
        fingerprint = chain(fingerprint, host.fingerprint)
        examples += sum(len(set(of_row) - {0}) for of_row in segments.tolist())
        tokens += int((segments > 0).sum())
        loss_tokens += int((host.batch.weights_BT > 0).sum())
        counted = {"examples": examples, "tokens": tokens, "loss_tokens": loss_tokens, "fingerprint": fingerprint}
        counted |= {"slots": row["step"] * ROWS * (INPUTS + TARGETS), "flops": row["step"] * flops}
        assert {name: row[name] for name in counted} == counted
        measured = {"loss", "grad_norm", "learning_rate"}
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in measured)
        validated = {"validation_loss"} if row["step"] in (4, 8) else set()
        assert set(row) == {"step"} | set(counted) | measured | validated
    assert [row["learning_rate"] for row in rows[:3]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rows[-1]["loss"] < rows[0]["loss"]
    timings = read_rows(run.folder / RunFiles.TIMINGS)
    assert [row["step"] for row in timings] == list(range(1, STEPS + 1))
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(timings))
    assert timings[-1]["seconds"] == pytest.approx(sum(row["step_seconds"] for row in timings))


@families
def test_validation_loss_is_the_mean_over_weighted_tokens(unbroken: dict[str, Unbroken], family: str) -> None:
    run = unbroken[family]

    @jax.jit
    def logits(params: Any, batch: Any) -> jax.Array:
        model = run.fitted.model.merge(params)
        return model.hidden(batch) @ model.head()

    total = weight = 0.0
    for host in run.task.validation:
        x_BTV = np.asarray(logits(run.fitted.params, host.batch), np.float64)
        chosen_BT = np.take_along_axis(x_BTV, host.batch.targets_BT[..., None], axis=-1)[..., 0]
        total += ((np.log(np.exp(x_BTV).sum(-1)) - chosen_BT) * host.batch.weights_BT).sum()
        weight += host.batch.weights_BT.sum()
    found = read_rows(run.folder / RunFiles.METRICS)[-1]["validation_loss"]
    assert found == pytest.approx(total / weight, rel=1e-6)


def test_the_run_directory_says_what_ran_where(unbroken: dict[str, Unbroken]) -> None:
    run = unbroken["gpt"]
    config = json.loads((run.folder / RunFiles.CONFIG).read_text())
    assert config == {"schema_version": SCHEMA_VERSION, **run.task.config}
    environment = json.loads((run.folder / RunFiles.ENVIRONMENT).read_text())
    assert set(MACHINE_KEYS) < set(environment)
    assert {key: environment[key] for key in DATA} == DATA


# --- What is resumed


@families
@pytest.mark.parametrize("stops", [(2,), (3,), (4, 7), (8,)], ids=str)
def test_resumed_is_unbroken(
    unbroken: dict[str, Unbroken], family: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    """Stopped before the first checkpoint, while one is due, in between, twice, and before the last: the same bits."""
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


def test_resumed_is_unbroken_on_a_mesh(tmp_path: Path) -> None:
    """Every array comes back onto its own shardings."""
    sharded = task("gpt", mesh=MeshShape(data=2, fsdp=2, tensor=2))
    whole = fit(sharded, tmp_path / "whole", Observer())
    with pytest.raises(Stopped):
        fit(sharded, tmp_path / "broken", Observer(stop_at=7))
    resumed = fit(sharded, tmp_path / "broken", Observer())
    assert resumed.params["embedding"]["table_VD"].sharding.spec == PartitionSpec("tensor", "fsdp")
    same_bits(resumed.params, whole.params)
    assert (tmp_path / "broken" / RunFiles.METRICS).read_bytes() == (tmp_path / "whole" / RunFiles.METRICS).read_bytes()


@pytest.mark.parametrize("family", ["gpt", pytest.param("t5like", marks=pytest.mark.slow)])
def test_a_run_goes_on_on_other_devices(unbroken: dict[str, Unbroken], family: str, tmp_path: Path) -> None:
    """From the same checkpoint, computed in other ways: the same batches, losses equal but for rounding."""
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
    """A stream that nobody may read."""

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


def test_another_machine_is_warned_of(unbroken: dict[str, Unbroken], tmp_path: Path) -> None:
    shutil.copytree(unbroken["gpt"].folder, tmp_path / "arm")
    path = tmp_path / "arm" / RunFiles.ENVIRONMENT
    path.write_text(json.dumps({**json.loads(path.read_text()), "threads": 1234}))
    observer = Observer()
    fit(unbroken["gpt"].task, tmp_path / "arm", observer)
    assert any(note.startswith("warning: threads was 1234 when this run began") for note in observer.notes)


# --- What is refused


def test_another_config_is_refused_with_the_difference(unbroken: dict[str, Unbroken]) -> None:
    run = unbroken["gpt"]
    before = run.metrics()
    with pytest.raises(UserError, match="another config .train.budget.amount: 8.0 -> 9.0.: choose another"):
        fit(task("gpt", budget=Budget(unit="steps", amount=9)), run.folder, Observer())
    wide = dataclasses.replace(EXECUTION, dtype="bfloat16", scan_layers=not EXECUTION.scan_layers)
    with pytest.raises(UserError, match=r'config \(train.execution.dtype: "float32" -> "bfloat16"\): choose'):
        fit(task("gpt", execution=wide), run.folder, Observer())
    with pytest.raises(UserError, match='model.kind: "gpt" -> "t5like"'):
        fit(task("t5like"), run.folder, Observer())
    assert run.metrics() == before


@pytest.mark.parametrize("key", DATA)
def test_other_data_is_refused(unbroken: dict[str, Unbroken], key: str) -> None:
    changed = dataclasses.replace(unbroken["gpt"].task, data={**DATA, key: "other"})
    with pytest.raises(UserError, match=f"was begun on other data .{key}: {DATA[key]} -> other.: choose another"):
        fit(changed, unbroken["gpt"].folder, Observer())


def test_a_second_process_is_refused(unbroken: dict[str, Unbroken], tmp_path: Path) -> None:
    """And a killed one's hold ends with it."""
    code = (
        "import sys, time; from pathlib import Path; from common.train.run_dir import owned\n"
        "with owned(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=f"is being trained by process {holder.pid}"):
                fit(unbroken["gpt"].task, tmp_path, Observer())
        finally:
            holder.send_signal(signal.SIGKILL)
    assert not (tmp_path / RunFiles.CONFIG).exists()
    with rd.owned(tmp_path):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshShape(data=3)}, r"data.rows is 8, .*\(1 x 3 x 1 x 1\); nearest: 9"),
        ({"mesh": MeshShape(data=2, fsdp=4), "accumulation": 2}, r"\(1 x 2 x 4 x 2\); nearest: 16"),
        ({"accumulation": 5}, r"\(1 x 1 x 1 x 5\); nearest: 10"),
    ],
)
def test_rows_that_do_not_divide_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        fit(task("gpt", **change), tmp_path / "arm", Observer())
    assert not (tmp_path / "arm").exists()


# --- What is not finite


@dataclasses.dataclass
class Poisoned:
    """A stream, one of whose batches has infinite weights."""

    stream: Stream
    step: int

    @property
    def content(self) -> str:
        return self.stream.content

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        for step, host in enumerate(self.stream.iterate(start, stop), start=start + 1):
            if step == self.step:
                weights = np.full_like(host.batch.weights_BT, np.inf)
                host = dataclasses.replace(host, batch=dataclasses.replace(host.batch, weights_BT=weights))
            yield host


@pytest.mark.parametrize(("step", "good"), [(2, None), (5, 3), (6, 3), (8, 6)])
def test_a_loss_that_is_not_finite_stops_the_run(
    unbroken: dict[str, Unbroken], step: int, good: int | None, tmp_path: Path
) -> None:
    """Named: the step and the last good checkpoint. Without the poison the run goes on as if it had never been."""
    run = unbroken["gpt"]
    last = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good} in "
    with pytest.raises(UserError, match=f"^step {step}: loss (nan|inf), .*{last}"):
        fit(dataclasses.replace(run.task, stream=Poisoned(run.task.stream, step)), tmp_path, Observer())
    assert saved_steps(tmp_path) == set(range(3, step, 3))
    assert [row["step"] for row in read_rows(tmp_path / RunFiles.METRICS)] == list(range(1, step))
    fitted = fit(run.task, tmp_path, Observer())
    same_bits(fitted.params, run.fitted.params)
    assert (tmp_path / RunFiles.METRICS).read_bytes() == run.metrics()


# --- Checkpoints that are damaged


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


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_a_corrupted_checkpoint_is_passed_over(
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


# --- Arms that differ


def result_of(arm: str, family: str, fitted: Fitted) -> ArmResult:
    """As an arm leaves it; what no data check reads is the same for all."""
    progress = fitted.progress
    measured = ("train_loss", "validation_loss", "train_seconds", "tokens_per_second", "data_wait_share")
    return ArmResult(
        arm=arm,
        parameters=tiny(family).param_count(),
        steps=progress.consumed_batches,
        flops=Flops(full_attention=1.0, causal_half=1.0, six_nd=1.0, useful_full_attention=progress.useful_flops),
        examples=progress.examples,
        tokens=progress.tokens,
        loss_tokens=progress.loss_tokens,
        slots=progress.consumed_batches * ROWS * (INPUTS + TARGETS),
        input_fill=1.0,
        target_fill=1.0,
        fingerprint=progress.fingerprint,
        xla_flops_per_step=1.0,
        ledger_flops_per_step=1.0,
        scores=(),
        **dict.fromkeys(measured, 1.0),
    )


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        ({}, set()),
        ({"order": 1}, {"same data in the same order"}),
        ({"tokenizer_hash": "other"}, {"same data in the same order", "same tokenizer"}),
        ({"content_id": "version 2"}, {"same data in the same order", "same dataset version"}),
    ],
    ids=["same", "order", "tokenizer", "dataset"],
)
def test_the_certificate_tells_arms_with_other_data(
    unbroken: dict[str, Unbroken], change: dict[str, Any], differ: set[str], tmp_path: Path
) -> None:
    one, other = unbroken["t5like"], unbroken["gpt"]
    fitted, folders = other.fitted, {"t5like": one.folder, "gpt": other.folder}
    if change:
        folders["gpt"] = tmp_path
        data = {**DATA, **{key: value for key, value in change.items() if key in DATA}}
        with pytest.raises(Stopped):
            fit(task("gpt", loader(**change), data), tmp_path, Observer(stop_at=2))
        fingerprint = read_rows(tmp_path / RunFiles.METRICS)[-1]["fingerprint"]
        fitted = dataclasses.replace(fitted, progress=dataclasses.replace(fitted.progress, fingerprint=fingerprint))
    results = [result_of("t5like", "t5like", one.fitted), result_of("gpt", "gpt", fitted)]
    certificate = certify(
        results,
        environments={arm: json.loads((path / RunFiles.ENVIRONMENT).read_text()) for arm, path in folders.items()},
        fingerprints={
            arm: {row["step"]: row["fingerprint"] for row in read_rows(path / RunFiles.METRICS)}
            for arm, path in folders.items()
        },
    )
    assert {check.name for check in certificate.checks if not check.agrees} == differ
    assert certificate.agrees == (not differ)
    if differ:
        assert certificate.checks[0].detail.startswith(
            "the arms differ from their first step (1): other order, tokenizer"
        )
        assert not certify(results).agrees  # by the last fingerprints alone
