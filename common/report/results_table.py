"""One tidy table of a study's results: a row for each run, step, task and metric."""

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_atomically
from common.report.run_files import FinishedRun, StudyRuns
from common.report.run_list import ListedRun

VALIDATION = "validation"
"""The task of the validation loss. A scored split may have the same name; its metric is another."""
COLUMNS = {
    **{"study": "string", "run": "string", "identity": "string", "arm": "string", "seed": "int64"},
    **{"learning_rate": "float64", "compared": "bool", "finished": "bool", "step": "int64", "task": "string"},
    **{"group": "string", "metric": "string", "value": "float64", "low": "float64", "high": "float64", "n": "int64"},
    "higher_is_better": "bool",
}
"""Every table's columns with their Parquet types; those of labels stand before `compared`."""


def results_table(study: StudyRuns) -> list[dict[str, Any]]:
    """Returns a row for each validation loss of a run, finished or not, and for each score after its last step.

    Every row has the columns study, run, identity, arm, seed, learning_rate, one for each label of the arms (None where
    an arm lacks it; with `label_` in front where a column has its name), one for each further hyperparameter of the
    study's search (named by its dotted path), compared (whether arms are compared by the run), finished (whether the
    run is trained and scored), step, task (`validation`, or the scored split), group (`all`, or a kind of example),
    metric (`loss` in nats per token, `exact_match` as a share 0..1, `bleu` 0..100), value, low and high (a 95 %
    interval over examples; None where there is none), n (examples; None for losses) and higher_is_better.
    """
    listed = [*(run.listed for run in study.runs), *(run.listed for run in study.begun)]
    own = dict.fromkeys(label for run in listed for label in run.labels)
    labels = [label for label in own if label not in ("arm", "seed", "learning_rate")]
    tried = dict.fromkeys(path for run in listed for path in run.tried)
    compared = {run.name for run in study.compared}

    def described(run: ListedRun) -> dict[str, Any]:
        return {
            "study": str(study.study.get("name", "")),
            "run": run.name,
            "identity": run.identity,
            "arm": run.arm,
            "seed": run.seed,
            "learning_rate": run.trial.rate,
            **{f"label_{label}" if label in COLUMNS else label: run.labels.get(label) for label in labels},
            **{path: run.tried.get(path) for path in tried},
        }

    rows = [
        {**described(run.listed), "compared": run.name in compared, "finished": True, **measure}
        for run in study.runs
        for measure in _measures(run)
    ]
    return rows + [
        {**described(run.listed), "compared": _will_be_compared(study, run.listed), "finished": False, **measure}
        for run in study.begun
        for measure in _losses(run.validation_losses)
    ]


def _will_be_compared(study: StudyRuns, run: ListedRun) -> bool:
    """Returns whether arms are compared by an unfinished run once it is finished; of a search's trials, by none yet."""
    return run.compared and (not study.study.get("search") or run.arm in study.listed.chosen)


def _losses(by_step: Mapping[int, float]) -> Iterator[dict[str, Any]]:
    for step, loss in by_step.items():
        measured = {"value": loss, "low": None, "high": None, "n": None, "higher_is_better": False}
        yield {"step": step, "task": VALIDATION, "group": "all", "metric": "loss", **measured}


def _measures(run: FinishedRun) -> Iterator[dict[str, Any]]:
    last = run.result.steps
    losses = {row.step: row.validation_loss for row in run.metrics if row.validation_loss is not None}
    yield from _losses({**losses, last: run.result.validation_loss})
    for score in run.result.scores:
        for metric, found in (("exact_match", score.exact_match), ("bleu", score.bleu)):
            if found is not None:
                measured = {**dataclasses.asdict(found), "n": score.examples, "higher_is_better": True}
                yield {"step": last, "task": score.split, "group": score.group, "metric": metric, **measured}


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a table as CSV or Parquet, by the suffix of `path`; whole or not at all.

    CSV has a header, an empty cell for None and `inf` for an infinite loss. Raises UserError for another suffix.
    """
    writers = {".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in writers:
        raise UserError(f"{path} ends in neither .csv nor .parquet: results are written as one of these")
    write_atomically(path, writers[path.suffix.lower()](rows))


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0] if rows else COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = {
        name: pyarrow.array(_of_one_type([row[name] for row in rows]), COLUMNS.get(name))
        for name in (rows[0] if rows else COLUMNS)
    }
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return bytes(out.getvalue())


def _of_one_type(values: list[Any]) -> list[Any]:
    """Returns the values of a column; where some are numbers and others text, as labels may be, all are text."""
    kinds = {type(value) for value in values if value is not None}
    if str not in kinds or kinds == {str}:
        return values
    return [None if value is None else str(value) for value in values]
