"""`twinstack results`: one tidy table of everything that a study has measured."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, nearest
from common.report.results_table import results_table, write_table
from common.report.run_files import read_results
from common.terminal import harmless
from experiments.cli.status import study_path


def results(*, source: str, out: Path, rows: Sequence[str]) -> None:
    """Writes the table; says how many runs are not finished, since a comparison of these is not what it looks like."""
    study = read_results(study_path(source))
    found = results_table(study)
    for selection in rows:
        found = _selected(found, selection)
    write_table(found, out)
    lacking, begun = len(study.unfinished), len(study.begun)
    unfinished = f"; {lacking} of {len(study.listed.runs)} runs are not finished, {begun} of these have rows"
    print(harmless(f"{out}: {len(found):,} rows{unfinished if lacking else ''}"))


def _selected(found: Sequence[dict[str, Any]], selection: str) -> list[dict[str, Any]]:
    """Returns the rows that COLUMN=VALUE,VALUE... selects; a value may have wildcards.

    Raises UserError for an unknown column and where no row is left.
    """
    column, equals, values = selection.partition("=")
    if not equals:
        raise UserError(f"{selection!r} selects no rows; valid: COLUMN=VALUE")
    if column not in found[0]:
        raise UserError(f"unknown column {column!r}: {nearest(column, found[0])}")
    kept = [row for row in found if any(fnmatch.fnmatchcase(str(row[column]), value) for value in values.split(","))]
    if not kept:
        present = sorted({str(row[column]) for row in found})
        raise UserError(f"no row has {selection}; {column} is {', '.join(present)}")
    return kept
