"""One failure stops no other run, and one worker has a run at a time."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.errors import UserError
from common.files import read_json, write_json
from common.train.anomalies import Diverged
from common.train.loop import fit
from common.train.run_files import RunFiles
from experiments.cli.main import main
from experiments.run import After
from experiments.running import execute
from experiments.running.study_folder import StudyFolder, working_on
from experiments.running.study_run import conclude, run_study
from tests.experiments.running.finished import Done, worked

# --- Failures


@contextlib.contextmanager
def failing(error: Exception, *names: str) -> Iterator[list[str]]:
    """Makes the training of these runs fail; yields the names of all runs whose training begins."""
    begun: list[str] = []

    def train(task: Any, run_dir: Path, watcher: Any) -> Any:
        begun.append(run_dir.name)
        if run_dir.name in names:
            raise error
        return fit(task, run_dir, watcher)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "fit", train)
        yield begun


@pytest.mark.parametrize(
    ("error", "why"),
    [(UserError("no space left"), "no space left"), (ValueError("a\nbug"), "ValueError: a\nbug")],
    ids=["a mistake", "a bug"],
)
def test_the_study_goes_on_where_a_run_fails(
    done: Done, copied: Path, error: Exception, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once the cause is gone, the same command trains the run, and forgets the failure."""
    arms = tuple(done.study.arms)
    for name in arms:
        (copied / name / RunFiles.RESULT).unlink()
    with failing(error, "gpt") as begun:
        assert run_study(StudyFolder(copied, done.study), arms) == 1
    assert begun == ["gpt", "t5like"]
    failure = read_json(copied / "gpt" / RunFiles.FAILURE)
    assert failure["error"] == why and not failure["diverged"]
    captured = capsys.readouterr()
    assert "gpt FAILED" in captured.out and "without gpt, not trained and scored yet" in captured.err
    assert ("Traceback" in captured.out) == (not isinstance(error, UserError))
    folder = StudyFolder(copied, done.study)
    assert [folder.standing(member).state for member in folder.members().members] == ["failed", "done"]
    assert main(["status", str(copied)]) == 0
    assert "1 done, 1 failed" in capsys.readouterr().out
    assert worked(copied, done.study).failed == {}
    assert not (copied / "gpt" / RunFiles.FAILURE).exists()


def test_a_run_that_diverged_is_not_tried_again(done: Done, copied: Path) -> None:
    """Unless its config changes."""
    (copied / "gpt" / RunFiles.RESULT).unlink()
    with failing(Diverged("step 3: loss nan"), "gpt") as begun:
        assert worked(copied, done.study).failed == {"gpt": "step 3: loss nan"}
        assert worked(copied, done.study).failed == {"gpt": "step 3: loss nan"} and begun == ["gpt"]
    failure = read_json(copied / "gpt" / RunFiles.FAILURE)
    write_json(copied / "gpt" / RunFiles.FAILURE, failure | {"identity": "0"})
    with failing(Diverged("again"), "gpt") as begun:
        assert worked(copied, done.study).failed == {"gpt": "again"} and begun == ["gpt"]


def test_a_run_waits_for_one_that_failed(done: Done, copied: Path) -> None:
    (copied / "gpt" / RunFiles.RESULT).unlink()
    tuned = dataclasses.replace(done.study.arms["gpt"], after=After(arm="gpt"))
    study = dataclasses.replace(done.study, arms={**done.study.arms, "tuned": tuned})
    with failing(UserError("no space left"), "gpt") as begun:
        outcome = worked(copied, study)
    assert (list(outcome.failed), outcome.waiting, begun) == (["gpt"], ["tuned"], ["gpt"])


def test_other_data_are_refused(done: Done, copied: Path) -> None:
    environment = read_json(copied / "gpt" / RunFiles.ENVIRONMENT)
    write_json(copied / "gpt" / RunFiles.ENVIRONMENT, environment | {"content_id": "0"})
    outcome = worked(copied, done.study)
    assert list(outcome.failed) == ["gpt"] and "was begun on other data (content_id: 0 ->" in outcome.failed["gpt"]


# --- Several workers


def test_a_run_directory_has_one_worker(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with working_on(folder) as mine, working_on(folder) as other:
        assert mine and not other
    with working_on(folder) as mine:  # a lock that an ended process left behind holds nobody up
        assert mine and (folder / RunFiles.WORKER).exists()


def test_a_lock_that_another_process_only_looks_at_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`twinstack status` holds a lock for a moment to see whether it is held."""
    take, asked = fcntl.flock, []

    def refuse_once(file: Any, operation: int) -> None:
        asked.append(operation)
        if len(asked) == 1:
            raise BlockingIOError
        take(file, operation)

    monkeypatch.setattr(fcntl, "flock", refuse_once)
    with working_on(tmp_path / "run") as mine:
        assert mine and len(asked) == 2


def test_a_run_of_another_machine_is_left_to_it_while_it_writes(done: Done, copied: Path) -> None:
    """Its lock may not be visible here. A run of this machine that ended a moment ago is resumed at once."""
    (copied / "gpt" / RunFiles.RESULT).unlink()
    os.utime(copied / "gpt" / RunFiles.TIMINGS)
    member = StudyFolder(copied, done.study).member("gpt")
    assert member is not None
    here = (copied / "gpt" / RunFiles.WORKER).read_text()
    assert StudyFolder(copied, done.study).standing(member).state == "waiting"
    (copied / "gpt" / RunFiles.WORKER).write_text("another-machine\n")
    assert StudyFolder(copied, done.study).standing(member).state == "running"
    os.utime(copied / "gpt" / RunFiles.TIMINGS, (0, 0))
    assert StudyFolder(copied, done.study).standing(member).state == "waiting"
    with working_on(copied / "gpt"):
        assert (copied / "gpt" / RunFiles.WORKER).read_text() == here
        assert StudyFolder(copied, done.study).standing(member).state == "running"


def test_a_run_that_another_worker_has_is_left_to_it(done: Done, copied: Path) -> None:
    (copied / "gpt" / RunFiles.RESULT).unlink()
    with working_on(copied / "gpt"), failing(UserError("begun"), "gpt") as begun:
        outcome = worked(copied, done.study)
        assert (outcome.trained, outcome.failed, outcome.waiting, begun) == ([], {}, ["gpt"], [])
        assert conclude(StudyFolder(copied, done.study), outcome, Console(quiet=True)) == 0


def test_a_patient_worker_takes_over_from_one_that_died(
    done: Done, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "gpt" / RunFiles.RESULT).unlink()
    with contextlib.ExitStack() as another:
        assert another.enter_context(working_on(copied / "gpt"))
        monkeypatch.setattr(execute.time, "sleep", lambda _: another.close())
        with failing(UserError("taken"), "gpt") as begun:
            assert worked(copied, done.study, patient=True).failed == {"gpt": "taken"}
        assert begun == ["gpt"]
