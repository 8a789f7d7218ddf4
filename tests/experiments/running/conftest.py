"""A finished study for all tests of this folder."""

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.files import read_json
from common.train.programs import Setup
from common.train.run_files import RunFiles
from experiments.running import scoring
from experiments.running.audit import StepCount, count_step
from experiments.running.study_folder import StudyFolder
from experiments.running.study_run import run_study
from tests.experiments.running.finished import Done, short
from tests.experiments.tiny_study import tiny_study, write_data


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    study, path, found = tiny_study(folder).edited(short), folder / "runs" / "tiny", []

    def noted(setup: Setup) -> StepCount:
        """Stands for an audit that uses up all memory and ends the process."""
        found.append(read_json(path / setup.model.kind / RunFiles.RESULT))
        return count_step(setup)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(scoring, "count_step", noted)
        assert run_study(StudyFolder(path, study), tuple(study.arms)) == 0
    return Done(study=study, path=path, said=said.getvalue(), before_the_audit=found)


@pytest.fixture
def copied(done: Done, tmp_path: Path) -> Path:
    """A copy of the finished study's directory."""
    return Path(shutil.copytree(done.path, tmp_path / "runs" / "tiny"))


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every attempt to train, decode or count fail."""

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("work")

    for work in ("execute.fit", "scoring.greedy_decoder", "scoring.count_step"):
        monkeypatch.setattr(f"experiments.running.{work}", refuse)
