"""Committed tables of results are complete, and of the studies as they stand."""

import csv
from pathlib import Path

import pytest

from common.report.run_list import Trial
from experiments import find
from experiments.members import members_of

TABLES = sorted((Path(find.__file__).parent / "results").glob("*.csv"))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_a_table_has_the_runs_of_its_study(table: Path) -> None:
    """All runs that follow from the losses in it, rate by rate and seed by seed, known by what decides them."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "loss"]
    trained = [(row["arm"], Trial(rate=float(row["learning_rate"])), int(row["seed"])) for row in rows]
    losses = {key: float(row["value"]) for key, row in zip(trained, rows, strict=True)}  # those of the last steps
    members = members_of(find.load(table.stem), losses)
    assert members.complete
    assert {member.name: member.identity for member in members.members} == {row["run"]: row["identity"] for row in rows}
    compared = {row["run"] for row in rows if row["compared"] == "True"}
    assert compared == {member.name for member in members.of_comparison()}


def test_there_are_tables() -> None:
    assert TABLES
