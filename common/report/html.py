"""The report of a comparison: one HTML file that needs nothing else, written from a run directory.

Every text from data, configs and names goes through Jinja2's autoescape; only the drawings and the marked differences
are built as markup, and those escape their parts themselves. The page's policy forbids it to load anything.
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
from common.report.certificate import certify_run, flatten
from common.report.run_files import ArmRun, Run, read_run
from common.report.units import duration, percent, si
from common.report.verdicts import Example, caveat, headline, pair_examples, verdicts
from common.train.run_files import ExperimentFiles

if TYPE_CHECKING:
    from markupsafe import Markup

ERRORS_SHOWN, SUCCESSES_SHOWN = 24, 8
_TEMPLATES, _PAGE = Path(__file__).parent / "templates", "report.html.j2"


def write_report(run_dir: Path) -> Path:
    """Writes RUN/report.html from the files of a finished run and returns its path.

    The same files give the same bytes. Raises `UserError` naming the file where one is missing or broken.
    """
    path = run_dir / ExperimentFiles.REPORT
    write_atomically(path, render(read_run(run_dir)).encode())
    return path


def write_figure(run_dir: Path, path: Path) -> None:
    """Writes the drawing of all arms in their order as an SVG file of its own, in the page's light colours."""
    style = (_TEMPLATES / _PAGE).read_text(encoding="utf-8")
    light = re.search(r":root \{(.*?)\n\}", style, flags=re.DOTALL)
    assert light is not None
    palette = dict(re.findall(r"(--[\w-]+): (#\w+);", light[1]))
    drawing = plots.standalone(plots.arms_plot(read_run(run_dir).results), palette, "sans-serif")
    write_atomically(path, drawing.encode())


def render(run: Run) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_PAGE).render(_context(run))


def _context(run: Run) -> dict[str, Any]:
    examples = pair_examples(run.arms)
    abouts = [arm.config.get("about", "") for arm in run.arms]
    known = {"arms", "name", "question", "schema_version"}
    return {
        "title": str(run.experiment.get("name", "comparison")),
        "question": str(run.experiment.get("question", "")),
        "card": {k: v for k, v in run.experiment.items() if k not in known and isinstance(v, (str, int, float)) and v},
        "arms": [arm.name for arm in run.arms],
        "symbols": [_symbol(i) for i in range(len(run.arms))],
        "tiles": [_tile(arm, headline(run)) for arm in run.arms],
        "confidence": percent(CONFIDENCE, 0),
        "verdicts": verdicts(run),
        "caveat": caveat(run),
        "certificate": certify_run(run),
        "about": [str(about) for about in abouts] if any(abouts) else [],
        "arms_plot": plots.arms_plot(run.results) if len(run.arms) > 2 else None,
        "turns_plot": plots.turns_plot(run.results) if any(r.multi_turn for r in run.results) else None,
        "incremental": [r.arm for r in run.results if any(t.read_new_seconds is not None for t in r.multi_turn)],
        "rows": tables.comparison_rows(run.results),
        "loss_plots": [plots.loss_plot(run.arms, axis) for axis in plots.LOSS_AXES],
        "smoothing": max(plots.smoothing_window(len(arm.metrics)) for arm in run.arms),
        "groups": [
            (split, plots.groups_plot(run.results, split), tables.group_rows(run.results, split))
            for split in tables.splits(run.results)
        ],
        "errors": _shown([e for e in examples if e.wrong], ERRORS_SHOWN),
        "successes": _shown([e for e in examples if not e.wrong], SUCCESSES_SHOWN),
        "wrong": samples.count_wrong(examples),
        "samples": len(examples),
        "config": _side_by_side([arm.config for arm in run.arms]),
        "environment": _side_by_side([arm.environment for arm in run.arms]),
    }


def _symbol(index: int) -> str:
    """The plots' marker of an arm, as a character for legends."""
    return {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚"}[plots.MARKERS[index % len(plots.MARKERS)]]


def _tile(arm: ArmRun, headline: str) -> dict[str, str]:
    """An arm in a few figures; the large one is the headline's on the first split, or else the validation loss."""
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
            "label": f"BLEU, {whole.split} [{whole.bleu.low:.1f}, {whole.bleu.high:.1f}]{_copied(whole)}",
            "lines": f"validation loss {loss} · {lines}",
        }
    low, high = whole.exact_match.low, whole.exact_match.high
    return {
        "name": arm.name,
        "value": percent(whole.exact_match.value),
        "label": f"exact match, {whole.split} [{100 * low:.1f}, {100 * high:.1f}]",
        "lines": f"validation loss {loss} · {lines}",
    }


def _copied(score: TextScore) -> str:
    return "" if score.copied_bleu is None else f"; copying the inputs scores {score.copied_bleu:.2f}"


def _shown(examples: Sequence[Example], count: int) -> list[dict[str, Any]]:
    return [
        {
            "split": example.split,
            "group": example.group,
            "inputs": samples.shorten(example.inputs),
            "target": samples.shorten(example.target),
            "answers": [_answer(answer.target, answer.prediction) if answer else None for answer in example.answers],
        }
        for example in samples.choose(examples, count)
    ]


def _answer(target: str, prediction: str) -> "tuple[bool, Markup]":
    return target == prediction, samples.mark_difference(target, prediction)


def _side_by_side(objects: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of every field in any of the objects, those that differ first."""
    flat = [flatten(value) for value in objects]
    rows = []
    for path in dict.fromkeys(path for values in flat for path in values):
        cells = [_show(values[path]) if path in values else "–" for values in flat]
        rows.append({"path": path, "cells": cells, "differs": len(set(cells)) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _show(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
