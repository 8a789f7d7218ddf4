"""`twinstack results`: one tidy table of everything that a study has measured."""

from pathlib import Path

from common.report.results_table import results_table, write_table
from common.report.run_files import read_study
from common.terminal import harmless
from experiments.cli.status import study_path


def results(*, source: str, out: Path) -> None:
    rows = results_table(read_study(study_path(source)))
    write_table(rows, out)
    print(harmless(f"{out}: {len(rows):,} rows"))
