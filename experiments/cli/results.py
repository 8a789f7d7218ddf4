"""`twinstack results`: one tidy table of everything that a study has measured."""

from pathlib import Path

from common.report.results_table import results_table, write_table
from common.report.run_files import read_results
from common.terminal import harmless
from experiments.cli.status import study_path


def results(*, source: str, out: Path) -> None:
    """Writes the table; says how many runs are not finished, since a comparison of these is not what it looks like."""
    study = read_results(study_path(source))
    rows = results_table(study)
    write_table(rows, out)
    lacking, begun = len(study.unfinished), len(study.begun)
    unfinished = f"; {lacking} of {len(study.listed.runs)} runs are not finished, {begun} of these have rows"
    print(harmless(f"{out}: {len(rows):,} rows{unfinished if lacking else ''}"))
