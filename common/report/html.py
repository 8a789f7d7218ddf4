"""Writes the report of a comparison, one self-contained HTML file, from a run directory.

Jinja2 escapes every text from data, configs and names. Only drawings and marked differences are built as markup, and
they escape their parts themselves. The page's content security policy forbids it to load anything.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.analysis.statistics import CONFIDENCE
from common.evals.measure import TextScore
from common.files import write_atomically
from common.report import plots, samples, tables
from common.report.certificate import certify_run, dotted_fields
from common.report.run_files import ArmRun, ComparisonRun, ScoredSample, read_run
from common.report.units import duration, percent, si
from common.report.verdicts import PairedExample, caveat, headline, pair_examples, verdicts
from common.train.run_files import ExperimentFiles

if TYPE_CHECKING:
    from markupsafe import Markup

ERRORS_SHOWN, SUCCESSES_SHOWN = 24, 8
"""Most samples in the report that an arm got wrong, and that all got right."""
_TEMPLATES, _PAGE = Path(__file__).parent / "templates", "report.html.j2"


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from the files of a finished run and returns its path.

    The same files give the same bytes. Raises `UserError` naming the file if one is missing or broken.
    """
    path = run_dir / ExperimentFiles.REPORT
    write_atomically(path, render(read_run(run_dir)).encode())
    return path


def write_figure(run_dir: Path, path: Path) -> None:
    """Writes the drawing of all arms in order as a separate SVG file, in the page's light colours."""
    style = (_TEMPLATES / _PAGE).read_text(encoding="utf-8")
    light = re.search(r":root \{(.*?)\n\}", style, flags=re.DOTALL)
    assert light is not None
    palette = dict(re.findall(r"(--[\w-]+): (#\w+);", light[1]))
    drawing = plots.standalone(plots.arms_plot(read_run(run_dir).results), palette, "sans-serif")
    write_atomically(path, drawing.encode())


def render(run: ComparisonRun) -> str:
    """Returns the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_PAGE).render(_context(run))


def _context(run: ComparisonRun) -> dict[str, Any]:
    """Returns the template's variables."""
    return {**_heading(run), **_findings(run), **_measurements(run), **_samples(run), **_settings(run)}


def _heading(run: ComparisonRun) -> dict[str, Any]:
    shown_elsewhere = {"arms", "name", "question", "schema_version"}
    return {
        "title": str(run.experiment.get("name", "comparison")),
        "question": str(run.experiment.get("question", "")),
        "card": {
            key: value
            for key, value in run.experiment.items()
            if key not in shown_elsewhere and isinstance(value, (str, int, float)) and value
        },
        "arms": [arm.name for arm in run.arms],
        "symbols": [_symbol(i) for i in range(len(run.arms))],
    }


def _findings(run: ComparisonRun) -> dict[str, Any]:
    return {
        "tiles": [_tile(arm, headline(run)) for arm in run.arms],
        "confidence": percent(CONFIDENCE, 0),
        "verdicts": verdicts(run),
        "caveat": caveat(run),
        "certificate": certify_run(run),
    }


def _measurements(run: ComparisonRun) -> dict[str, Any]:
    abouts = [str(arm.config.get("about", "")) for arm in run.arms]
    splits = tables.splits(run.results)
    return {
        "about": abouts if any(abouts) else [],
        "arms_plot": plots.arms_plot(run.results) if len(run.arms) > 2 else None,
        "turns_plot": plots.turns_plot(run.results) if any(r.multi_turn for r in run.results) else None,
        "incremental": [r.arm for r in run.results if any(t.read_new_seconds is not None for t in r.multi_turn)],
        "rows": tables.comparison_rows(run.results),
        "loss_plots": [plots.loss_plot(run.arms, axis) for axis in plots.LOSS_AXES],
        "smoothing": max(plots.smoothing_window(len(arm.metrics)) for arm in run.arms),
        "groups": [(s, plots.groups_plot(run.results, s), tables.group_rows(run.results, s)) for s in splits],
    }


def _samples(run: ComparisonRun) -> dict[str, Any]:
    examples = pair_examples(run.arms)
    errors = [example for example in examples if example.wrong]
    successes = [example for example in examples if not example.wrong]
    return {
        "errors": _sample_rows(errors, ERRORS_SHOWN),
        "successes": _sample_rows(successes, SUCCESSES_SHOWN),
        "wrong": len(errors),
        "samples": len(examples),
    }


def _settings(run: ComparisonRun) -> dict[str, Any]:
    return {
        "config": _field_rows([arm.config for arm in run.arms]),
        "environment": _field_rows([arm.environment for arm in run.arms]),
    }


def _symbol(index: int) -> str:
    """Returns an arm's marker in the plots as a character, for legends."""
    return {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚"}[plots.MARKERS[index % len(plots.MARKERS)]]


def _tile(arm: ArmRun, headline: str) -> dict[str, str]:
    """Returns an arm's key figures; the large one is the headline metric on the first split, or the validation loss."""
    result = arm.result
    whole = next((score for score in result.scores if score.group == "all"), None)
    lines = f"{si(result.parameters)} parameters · {duration(result.train_seconds)} of training"
    loss = f"{result.validation_loss:.4f}"
    if whole is None:
        return {"name": arm.name, "value": loss, "label": "validation loss, nats per token", "lines": lines}
    if headline == "bleu" and whole.bleu is not None:
        return {
            "name": arm.name,
            "value": f"{whole.bleu.value:.1f}",
            "label": f"BLEU, {whole.split} [{whole.bleu.low:.1f}, {whole.bleu.high:.1f}]{_copying_score(whole)}",
            "lines": f"validation loss {loss} · {lines}",
        }
    low, high = whole.exact_match.low, whole.exact_match.high
    return {
        "name": arm.name,
        "value": percent(whole.exact_match.value),
        "label": f"exact match, {whole.split} [{100 * low:.1f}, {100 * high:.1f}]",
        "lines": f"validation loss {loss} · {lines}",
    }


def _copying_score(score: TextScore) -> str:
    return "" if score.copied_bleu is None else f"; copying the inputs scores {score.copied_bleu:.2f}"


def _sample_rows(examples: Sequence[PairedExample], count: int) -> list[dict[str, Any]]:
    return [
        {
            "split": example.split,
            "group": example.group,
            "inputs": samples.shorten(example.inputs),
            "target": samples.shorten(example.target),
            "answers": [_marked_answer(sample) if sample else None for sample in example.answers],
        }
        for example in samples.choose(examples, count)
    ]


def _marked_answer(sample: ScoredSample) -> "tuple[bool, Markup]":
    """Returns whether the prediction is the target, and the prediction with its differences marked."""
    return sample.target == sample.prediction, samples.mark_difference(sample.target, sample.prediction)


def _field_rows(objects: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for every field of any of the objects, those that differ first."""
    fields = [dotted_fields(value) for value in objects]
    rows = []
    for path in dict.fromkeys(path for values in fields for path in values):
        cells = [_as_text(values[path]) if path in values else "–" for values in fields]
        rows.append({"path": path, "cells": cells, "differs": len(set(cells)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
