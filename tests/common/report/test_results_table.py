"""The tidy table has every measured number of a study once, and reads back as it was written."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from common.errors import UserError
from common.evals.text_metrics import score_texts
from common.report.results_table import COLUMNS, results_table, write_table
from common.report.run_files import StudyRuns, read_results, read_study
from tests.common.report.conftest import listed
from tests.common.report.studies import finished, study_of


@pytest.fixture
def study() -> StudyRuns:
    scores = tuple(score_texts(["a b c d e"] * 3 + ["x"], ["a b c d e"] * 4, ["k", "k", "l", "l"], "test"))
    return study_of(
        finished("a", chain="01", labels={"width": 64, "n": 1}, scores=scores, validation_loss=0.25),
        finished("b", seed=1, labels={"family": "gpt", "width": "wide"}, validation_loss=math.inf),
        finished("a", rate=1.0, compared=False),
    )


def test_a_row_for_each_run_step_task_and_metric(study: StudyRuns) -> None:
    rows = results_table(study)
    shown = [(row["run"], row["step"], row["task"], row["group"], row["metric"]) for row in rows]
    assert len(set(shown)) == len(shown)
    first = [line[1:] for line in shown if line[0] == "a-lr0.002-s0"]
    scored = [(2, "test", group, metric) for group in ("all", "k", "l") for metric in ("exact_match", "bleu")]
    assert first[0] == (2, "validation", "all", "loss") and set(first[1:]) <= set(scored) and len(first) >= 5
    assert [row["compared"] for row in rows if row["metric"] == "loss"] == [True, True, False]
    exact = next(row for row in rows if row["metric"] == "exact_match")
    assert exact["value"] == 0.75 and exact["low"] < 0.75 < exact["high"] and exact["n"] == 4
    assert exact["higher_is_better"] is True and rows[0]["higher_is_better"] is False
    assert {(row["arm"], row["width"], row["label_n"], row["family"]) for row in rows} == {
        ("a", 64, 1, None),
        ("b", "wide", None, "gpt"),
        ("a", None, None, None),
    }


def test_unfinished_runs_have_their_losses_so_far(write_run: Callable[..., Path]) -> None:
    """Also where a writer was killed in the middle of a line; a run without a validation loss has no row."""

    def stop(files: dict[str, Any]) -> None:
        del files["dec-only/result.json"]
        files["dec-only/metrics.jsonl"] = files["dec-only/metrics.jsonl"][:70]
        files["runs.json"]["runs"].append(listed("waiting"))

    folder = write_run(stop)
    with (folder / "dec-only" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 90, "validation_loss": 0.0')
    study = read_results(folder)
    rows = [row for row in results_table(study) if not row["finished"]]
    assert [(row["run"], row["step"], row["metric"]) for row in rows] == [
        ("dec-only", step, "loss") for step in (30, 60)
    ]
    metrics = [json.loads(line) for line in (folder / "dec-only" / "metrics.jsonl").read_text().split("\n")[:70]]
    assert [row["value"] for row in rows] == [metrics[step - 1]["validation_loss"] for step in (30, 60)]
    assert study.unfinished == ("dec-only", "waiting") and {row["compared"] for row in rows} == {True}
    assert {row["run"] for row in results_table(study) if row["finished"]} == {"enc-dec"}
    assert not read_study(folder).begun, "a report is of finished runs only"


def test_a_study_without_a_finished_run_has_a_table(write_run: Callable[..., Path]) -> None:
    def stop(files: dict[str, Any]) -> None:
        for arm in ("enc-dec", "dec-only"):
            del files[f"{arm}/result.json"]
        files["study.json"]["search"] = {"rates": [1e-3, 2e-3], "seeds": 1, "extend": 0}

    folder = write_run(stop)
    rows = results_table(read_results(folder))
    assert {(row["run"], row["finished"], row["compared"]) for row in rows} == {
        ("enc-dec", False, False),
        ("dec-only", False, False),
    }
    with pytest.raises(UserError, match="has no finished run"):
        read_study(folder)
    for arm in ("enc-dec", "dec-only"):
        (folder / arm / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has no validation loss of any run"):
        read_results(folder)


def test_further_hyperparameters_have_a_column_each() -> None:
    path = "train.optimizer.weight_decay"
    rows = results_table(study_of(finished("a", tried={path: 0.1}), finished("b")))
    assert [(row["arm"], row[path]) for row in rows] == [("a", 0.1), ("b", None)]


def test_every_validation_step_has_a_row() -> None:
    run = finished("a", chain="0123", validation_loss=0.5)
    (row,) = results_table(study_of(run))
    assert (row["step"], row["value"], row["identity"], row["study"]) == (4, 0.5, run.listed.identity, "made up")
    object.__setattr__(run.metrics[1], "validation_loss", 0.75)
    assert [(row["step"], row["value"]) for row in results_table(study_of(run))] == [(2, 0.75), (4, 0.5)]


def test_both_formats_hold_the_same(study: StudyRuns, tmp_path: Path) -> None:
    rows = results_table(study)
    for name in ("table.csv", "table.PARQUET"):
        write_table(rows, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.PARQUET", "table.csv"]
    table = pyarrow.parquet.read_table(tmp_path / "table.PARQUET")
    assert table.column_names == list(rows[0])
    assert set(rows[0]) == {*COLUMNS, "width", "label_n", "family"}
    assert [{**row, "width": row["width"] and str(row["width"])} for row in rows] == table.to_pylist()
    assert str(table.schema.field("low").type) == "double" and str(table.schema.field("seed").type) == "int64"
    with (tmp_path / "table.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows] == read
    assert np.isinf([float(row["value"]) for row in read if row["arm"] == "b"]).all()


def test_another_suffix_is_refused(study: StudyRuns, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"table.xlsx ends in neither .csv nor .parquet"):
        write_table(results_table(study), tmp_path / "table.xlsx")
    assert not list(tmp_path.iterdir())
