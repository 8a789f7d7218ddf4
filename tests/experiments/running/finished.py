"""A small study, and work on it without the report."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from common.train.config import Budget
from experiments.run import Run
from experiments.running.execute import Outcome, StudyWorker
from experiments.running.study_folder import StudyFolder
from experiments.study import Study
from tests.experiments.tiny_study import with_train

STEPS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """A finished study; tests that change its directory take a copy."""

    study: Study
    path: Path
    said: str
    before_the_audit: list[Any]
    """What `result.json` of each run held when the audit of its FLOPs began."""


def short(run: Run) -> Run:
    return with_train(run, budget=Budget(unit="steps", amount=STEPS), validate_every=3, checkpoint_every=3)


def worked(path: Path, study: Study, *arms: str, patient: bool = False) -> Outcome:
    """Checks and works on a study as a command does, without the report."""
    worker = StudyWorker(StudyFolder(path, study), Console(quiet=True), arms=arms or tuple(study.arms), patient=patient)
    worker.check()
    return worker.work()
