"""`twinstack status`: every state of a run, whoever works on it, read from files alone."""

import dataclasses
import json
from pathlib import Path

import pytest

from common.files import read_json, write_json
from common.train.run_files import RunFiles, StudyFiles
from experiments.cli.main import main
from experiments.running.study_folder import StudyFolder, working_on
from experiments.study import Study
from tests.experiments.tiny_study import STEPS, tiny_study


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    return dataclasses.replace(tiny_study(Path("/gone")), seeds=2)


@pytest.fixture
def folder(study: Study) -> StudyFolder:
    """gpt is done, gpt-s1 has failed, t5like is half trained, t5like-s1 has not begun."""
    folder = StudyFolder(Path("runs/tiny"), study, ["seeds=2"])
    folder.write_list(folder.members())
    done, failed, half, _ = folder.members().members
    write_json(folder.path / done.name / RunFiles.RESULT, {"made_from": done.made_from, "validation_loss": 1.5})
    folder.note_failure(failed, "[b]no\nspace\x1b[2J", diverged=False)
    timings = folder.path / half.name / RunFiles.TIMINGS
    timings.parent.mkdir()
    rows = [{"step": step, "seconds": 60.0 * step} for step in range(1, 11)]
    timings.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "sec')
    return StudyFolder(folder.path, study)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["status", *arguments]) == 0
    return capsys.readouterr().out


def row(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if f" {name} " in line]
    return " ".join(line.replace("│", " ").split())


def test_every_state_of_a_run(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "tiny")
    assert row(text, "gpt") == f"gpt done {STEPS} of {STEPS} 1.5000"
    assert row(text, "gpt-s1").startswith(f"gpt-s1 failed 0 of {STEPS} [b]no")
    assert row(text, "t5like") == f"t5like waiting 10 of {STEPS}"
    assert row(text, "t5like-s1") == f"t5like-s1 waiting 0 of {STEPS}"
    assert "4 runs: 1 done, 1 failed, 2 waiting" in text and "\x1b" not in text


@pytest.mark.parametrize("lock", [RunFiles.WORKER, RunFiles.LOCK])
def test_a_run_whose_lock_is_held_is_running(
    folder: StudyFolder, lock: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a worker, or by a program that trains it alone. The time left is that of its steps so far."""
    monkeypatch.setattr(RunFiles, "WORKER", lock)
    with working_on(folder.path / "t5like"):
        text = shown(capsys, "runs/tiny")
    assert row(text, "t5like") == f"t5like running 10 of {STEPS} {STEPS - 10} min 00 s left"
    assert "1 running" in text


def test_a_result_of_another_evaluation_is_not_done(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(folder.path / "gpt" / RunFiles.RESULT, {"made_from": "another", "validation_loss": 1.5})
    assert "waiting" in row(shown(capsys, "tiny"), "gpt")


def test_a_failure_of_another_config_is_none(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    failure = folder.path / "gpt-s1" / RunFiles.FAILURE
    write_json(failure, read_json(failure) | {"identity": "another"})
    assert row(shown(capsys, "tiny"), "gpt-s1") == f"gpt-s1 waiting 0 of {STEPS}"


def test_all_studies_are_one_line_each(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == "runs/tiny: 4 runs: 1 done, 1 failed, 2 waiting\n"


def test_a_study_that_an_earlier_version_wrote(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """It lacks fields that have been added since."""
    stored = read_json(folder.path / StudyFiles.STUDY)
    del stored["search"], stored["parity"], stored["arms"]["gpt"]["labels"]
    write_json(folder.path / StudyFiles.STUDY, stored)
    assert "4 runs" in shown(capsys, "tiny")


def test_a_directory_from_before_there_were_studies(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.path / StudyFiles.STUDY).rename(folder.path / StudyFiles.EARLIER)
    assert main(["status", "tiny"]) == 2
    assert (
        "runs/tiny was written before there were studies: only `twinstack report` reads it" in capsys.readouterr().err
    )
    assert main(["status", "tyni"]) == 2


def test_looking_writes_nothing(folder: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    shown(capsys, "tiny")
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before
