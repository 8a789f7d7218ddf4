"""`twinstack report`: writes the report of a study's directory again."""

from pathlib import Path

from common.terminal import harmless
from experiments.cli.status import study_path
from experiments.running.study_run import write_reports


def report(*, source: str, figure: Path | None) -> None:
    print(harmless(str(write_reports(study_path(source), figure))))
