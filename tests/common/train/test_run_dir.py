"""Run directories: when one is claimed, which runs it refuses, what damage is noticed, and when its rows are safe."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import UserError
from common.files import read_rows, write_rows
from common.train import run_dir as rd
from common.train.checkpoints import Checkpoints
from common.train.config import Budget
from common.train.environment import commit_of
from common.train.json_lines import JsonLines
from common.train.loop import fit
from common.train.metrics_log import last_losses
from common.train.run_files import RunFiles
from tests.common.train.runs import Unbroken
from tests.tiny import DATA, EXECUTION, Observer, task

ROOT = Path(__file__).parents[3]

MODEL, SOURCE = {"model": {"d_ff": 0}}, {"content_id": "a"}


# --- Claims


def test_nothing_is_claimed_before_something_is_trained(tmp_path: Path) -> None:
    """A mistake can be corrected in the same directory, until something has been trained there."""
    rd.claim(tmp_path, MODEL, SOURCE, {})
    rd.note_launch(tmp_path, MODEL, 1.0)
    changed = {"model": {"d_ff": 1}}
    for config, data in ((changed, SOURCE), (changed, {"content_id": "b"})):
        assert rd.claim(tmp_path, config, data, {}) == []
        assert not (tmp_path / RunFiles.LAUNCHES).exists()
    rd.note_launch(tmp_path, changed, 2.0)
    rd.claim(tmp_path, changed, {"content_id": "b"}, {})
    assert rd.note_launch(tmp_path, changed, 3.0) == 2.0  # the same run, launched again before it had trained
    write_rows(tmp_path / RunFiles.METRICS, [{"step": 1}])
    with pytest.raises(UserError, match="another config .model.d_ff: 1 -> 0."):
        rd.claim(tmp_path, MODEL, {"content_id": "b"}, {})
    with pytest.raises(UserError, match="begun on other data .content_id: b -> a."):
        rd.claim(tmp_path, changed, SOURCE, {})


def test_a_field_added_since_makes_no_other_run(tmp_path: Path) -> None:
    """Unless it has another value than the default, which the earlier run had without knowing."""

    def complete(config: dict[str, Any]) -> dict[str, Any]:
        return {"new": "usual", **config}

    rd.claim(tmp_path, MODEL, SOURCE, {})
    write_rows(tmp_path / RunFiles.METRICS, [{"step": 1}])
    assert rd.claim(tmp_path, {**MODEL, "new": "usual"}, SOURCE, {}, complete) == []
    with pytest.raises(UserError, match='another config .new: "usual" -> "other".'):
        rd.claim(tmp_path, {**MODEL, "new": "other"}, SOURCE, {}, complete)


@pytest.mark.parametrize("path", ["about", "train.validate_every", "train.keep_last", "train.patience.stall_seconds"])
def test_prose_and_watching_make_no_other_run(path: str) -> None:
    assert rd.config_changes(nested(path, 1), nested(path, 2)) == []
    assert len(rd.identity_changes(nested("train.seed", 1), nested("train.seed", 2))) == 1


def test_a_launch_records_how_it_is_watched(tmp_path: Path) -> None:
    """The config is that of the last launch; the list of changes holds those that may change a result's last bits."""
    before, now = nested("train.validate_every", 4), nested("train.validate_every", 2)
    rd.claim(tmp_path, before, SOURCE, {})
    write_rows(tmp_path / RunFiles.METRICS, [{"step": 1}])
    assert rd.claim(tmp_path, now, SOURCE, {}) == []
    rd.note_launch(tmp_path, now, 1.0)
    assert rd.stored_config(tmp_path) == now and read_rows(tmp_path / RunFiles.LAUNCHES) == [{"started": 1.0}]


def nested(path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    found = {last: value}
    for key in reversed(parents):
        found = {key: found}
    return found


DAMAGES = {
    "config.json null": (RunFiles.CONFIG, "null", "config.json does not hold a JSON object"),
    "config.json gone": (RunFiles.CONFIG, None, "config.json cannot be read"),
    "another schema": (RunFiles.CONFIG, '{"schema_version": 2}', "config.json has run schema 2, this version reads 1"),
    "environment.json a list": (RunFiles.ENVIRONMENT, "[]", "environment.json does not hold a JSON object"),
    "environment.json torn": (RunFiles.ENVIRONMENT, '{"cont', "environment.json cannot be read"),
    "rows of numbers": (RunFiles.METRICS, "1\n", "metrics.jsonl, line 1 is not a JSON object"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_named(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    rd.claim(tmp_path, MODEL, SOURCE, {})
    write_rows(tmp_path / RunFiles.METRICS, [{"step": 1}])
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        rd.claim(tmp_path, MODEL, SOURCE, {})


@pytest.mark.parametrize(
    "row", [{"step": 99_999_999, "first": 1}, {"step": 3, "first": 0}, {"step": "3", "first": 1}, {}]
)
def test_rolled_back_batches_are_the_runs_own(row: dict[str, Any], tmp_path: Path) -> None:
    write_rows(tmp_path / RunFiles.ROLLBACKS, [{"step": 5, "first": 4}])
    assert rd.rolled_back_batches(tmp_path, 8) == {4, 5}
    write_rows(tmp_path / RunFiles.ROLLBACKS, [row])
    with pytest.raises(UserError, match="rollbacks.jsonl skips batches .* of a run of 8"):
        rd.rolled_back_batches(tmp_path, 8)


def test_the_commit_is_that_of_the_repository_that_tracks_the_code(tmp_path: Path) -> None:
    """Not that of a project in whose folder the package is installed."""

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    for name in ("code.py", "venv/code.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert commit_of(tmp_path / "code.py") == "unknown"
    git("init", "-q")
    git("add", "code.py")
    git("commit", "-qm", "a project")
    assert git("rev-parse", "HEAD").startswith(commit_of(tmp_path / "code.py"))
    assert commit_of(tmp_path / "venv/code.py") == "unknown"
    (tmp_path / "code.py").write_text("changed")
    assert commit_of(tmp_path / "code.py").endswith("-dirty")


# --- Another run


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
    """The lock of a killed process ends with it."""
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


# --- Rows


def test_rows_are_safe_and_the_file_closed_before_a_checkpoint_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows up to the checkpoint's step are safe, also on a mount that uploads a file when it is closed."""
    synced: list[str] = []
    seen: list[tuple[int, list[int], list[str], list[str]]] = []
    real_save, real_sync = Checkpoints.save, os.fsync

    def sync(number: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        real_sync(number)

    def save(self: Checkpoints, state: Any, progress: Any, **more: Any) -> None:
        steps = [row["step"] for row in read_rows(tmp_path / RunFiles.METRICS)]
        seen.append((progress.consumed_batches, steps, open_files(".jsonl"), [*synced]))
        synced.clear()
        real_save(self, state, progress, **more)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Checkpoints, "save", save)
    fit(task("gpt"), tmp_path, Observer())
    assert [step for step, *_ in seen] == [3, 6, 8]
    for step, steps, opened, done in seen:
        assert steps == list(range(1, step + 1)) and opened == []
        lasting = [name for name in done if not name.startswith(".")]  # the others are temporary
        assert lasting == [RunFiles.METRICS, RunFiles.TIMINGS]


def open_files(suffix: str) -> list[str]:
    """Returns the paths of this process's open files that end in `suffix`; other threads may close theirs meanwhile."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return [path for path in found if path.endswith(suffix)]


def test_lost_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / RunFiles.METRICS
    write_rows(path, [{"step": step} for step in (1, 2, 5, 6, 7)])
    rows = JsonLines(path, keep_through_step=6)
    assert rows.lost == [3, 4]
    rows.write({"step": 7})
    rows.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 5, 6, 7]
    assert JsonLines(path, keep_through_step=0).lost == []
    write_rows(path, [{"stop": 1}])
    with pytest.raises(UserError, match="metrics.jsonl has a row without a step"):
        JsonLines(path, keep_through_step=1)


def remove(path: Path) -> None:
    """Removes a file or directory, even while a checkpoint is being written into it."""
    if not path.is_dir():
        path.unlink()
    while path.exists():
        shutil.rmtree(path, ignore_errors=True)


@dataclasses.dataclass
class Vandal(Observer):
    """Damages the run directory after a step."""

    damage: Callable[[], None] = lambda: None

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        super().step(row, timing)
        if row["step"] == 4:
            self.damage()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: remove(folder), r"(metrics.jsonl|checkpoints) is gone"),
        (lambda folder: remove(folder / RunFiles.METRICS), "metrics.jsonl is gone"),
        (lambda folder: (folder / RunFiles.TIMINGS).write_text(""), r"timings.jsonl has \d+ bytes instead of"),
    ],
    ids=["all", "metrics", "emptied"],
)
def test_damage_to_the_directory_during_the_run_is_noticed(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    """It is noticed at the next checkpoint, not at the end. The run resumes from what is left and reports the rest."""
    run_dir = tmp_path / "arm"
    observer = Vandal(damage=lambda: damage(run_dir))
    with pytest.raises(UserError, match=message):
        fit(task("gpt"), run_dir, observer)
    assert observer.steps[-1] <= 6
    again = Observer()
    fit(task("gpt"), run_dir, again)
    lost = run_dir.exists() and "resuming after step 3 of 8" in again.notes
    assert lost == any("lacks the rows of 3 steps from 1 to 3" in note for note in again.notes)
    assert last_losses(run_dir, 8)[1] > 0
    remove(run_dir / RunFiles.METRICS)
    with pytest.raises(UserError, match="metrics.jsonl lacks the row of the last step, 8"):
        last_losses(run_dir, 8)


def test_validation_batches_without_weights_are_refused_before_training(tmp_path: Path) -> None:
    of = task("gpt")
    empty = [
        dataclasses.replace(
            host, batch=dataclasses.replace(host.batch, weights_BT=np.zeros_like(host.batch.weights_BT))
        )
        for host in of.validation
    ]
    with pytest.raises(UserError, match="no token of the validation batches counts in the loss"):
        fit(dataclasses.replace(of, validation=tuple(empty)), tmp_path / "arm", Observer())
    assert not (tmp_path / "arm").exists()
