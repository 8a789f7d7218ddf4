"""Studies from Python: train what is missing, and read the results as rows."""

from pathlib import Path
from typing import Any

from common.errors import UserError
from common.paths import check_folder
from common.report.results_table import results_table
from common.report.run_files import read_results
from experiments.running.study_folder import StudyFolder
from experiments.study import Study


def run(study: Study, folder: str | Path | None = None) -> list[dict[str, Any]]:
    """Trains and scores whatever is missing of a study in this process; returns its results as `results` does.

    Args:
      folder: where its runs go; None: `runs/NAME`.

    Raises UserError for a mistake in the study, and if a run failed; the others are finished then, and the same call
    tries the failed ones again.
    """
    from experiments.running.study_run import run_study

    path = Path("runs") / study.name if folder is None else Path(folder)
    check_folder(path, "folder")
    opened = StudyFolder(path, study)
    if run_study(opened, tuple(study.arms)):
        standings = {member.name: opened.standing(member) for member in opened.members().members}
        failed = [f"{name} ({standing.why})" for name, standing in standings.items() if standing.state == "failed"]
        raise UserError(f"{path}: not all runs could be trained: {', '.join(failed)}")
    return results(path)


def results(folder: str | Path) -> list[dict[str, Any]]:
    """Returns everything that a study has measured, a dict for each run, step, task and metric.

    Runs that are not finished have the validation losses so far; their `finished` is False.
    `pandas.DataFrame(results(folder))` makes a table of them. Raises UserError where no run has a validation loss.
    """
    return results_table(read_results(Path(folder)))
