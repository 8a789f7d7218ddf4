"""Writes the report of a study, one self-contained HTML file, from its directory.

Jinja2 escapes every text from data, configs and names. Only drawings and marked differences are built as markup, and
they escape their parts themselves. The page's content security policy forbids it to load anything.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.analysis.statistics import CONFIDENCE
from common.config import dotted_fields
from common.evals.measure import TextScore
from common.files import write_atomically
from common.report import drawing, plots, samples, study_plots, tables
from common.report.certificate import certify
from common.report.examples import PairedExample, pair_examples
from common.report.findings import Findings, find, headline, measures
from common.report.run_files import FinishedRun, ScoredSample, StudyRuns, read_study
from common.report.study_page import FEW_COLUMNS, by_arm, columns, is_large, large_parts, mean_cell, search_parts
from common.report.units import duration, percent, si
from common.report.verdicts import caveat, verdicts
from common.train.run_files import StudyFiles

if TYPE_CHECKING:
    from markupsafe import Markup

ERRORS_SHOWN, SUCCESSES_SHOWN = 24, 8
"""Most samples in the report that an arm got wrong, and that all got right."""
_TEMPLATES, _PAGE = Path(__file__).parent / "templates", "report.html.j2"


def write_report(folder: Path) -> Path:
    """Writes STUDY/report.html from the files of a study's directory and returns its path.

    The same files give the same bytes. Raises `UserError` naming the file if one is missing or broken.
    """
    path = folder / StudyFiles.REPORT
    write_atomically(path, render(read_study(folder)).encode())
    return path


def write_figure(folder: Path, path: Path) -> None:
    """Writes the drawing of all arms in order as a separate SVG file, in the page's light colours.

    Of several seeds it shows each one, with means and intervals over seeds; of crossed factors, what each of them does.
    """
    style = (_TEMPLATES / _PAGE).read_text(encoding="utf-8")
    light = re.search(r":root \{(.*?)\n\}", style, flags=re.DOTALL)
    assert light is not None
    palette = dict(re.findall(r"(--[\w-]+): (#\w+);", light[1]))
    study = read_study(folder)
    if study.study.get("factors") and (found := find(study).found):
        drawn = study_plots.differences_plot(found)
    elif study.seeds > 1:
        drawn = study_plots.seeds_plot(by_arm(study), measures(study))
    else:
        drawn = plots.arms_plot(study.results)
    picture = drawing.standalone(drawn, palette, "sans-serif")
    write_atomically(path, picture.encode())


def render(study: StudyRuns) -> str:
    """Returns the page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_PAGE).render(_context(study))


def _context(study: StudyRuns) -> dict[str, Any]:
    """Returns the template's variables."""
    findings, shown, large = find(study), columns(study), is_large(study)
    return {
        **_heading(study),
        **_findings(study, findings),
        **search_parts(study, findings),
        **_measurements(study, shown),
        **(large_parts(study, findings) if large else _side_by_side(study)),
        **_samples(shown),
        "config": _field_rows([run.config for run in shown]),
        "environment": _field_rows([run.environment for run in shown]),
    }


def _heading(study: StudyRuns) -> dict[str, Any]:
    shown_elsewhere = {"arms", "name", "question", "schema_version", "seeds"}
    arms = [run.arm for run in study.first_seed]
    overrides = {"overrides": " ".join(study.listed.overrides)} if study.listed.overrides else {}
    return {
        "title": str(study.study.get("name", "study")),
        "question": str(study.study.get("question", "")),
        "card": {
            key: value
            for key, value in study.study.items()
            if key not in shown_elsewhere and isinstance(value, (str, int, float)) and value
        }
        | overrides,
        "arms": arms,
        "columns": len(columns(study)),
        "large": is_large(study),
        "symbols": [_symbol(i) for i in range(len(arms))],
    }


def _findings(study: StudyRuns, findings: Findings) -> dict[str, Any]:
    return {
        "confidence": percent(CONFIDENCE, 0),
        "verdicts": verdicts(study, findings),
        "caveat": caveat(study),
        "certificate": certify(study),
    }


def _measurements(study: StudyRuns, shown: Sequence[FinishedRun]) -> dict[str, Any]:
    abouts = [str(run.config.get("about", "")) for run in study.first_seed]
    results = [run.result for run in shown]
    splits = tables.splits(results)
    return {
        "tiles": _tiles(study),
        "about": abouts if any(abouts) else [],
        "arms_plot": None,
        "turns_plot": plots.turns_plot(results) if any(r.multi_turn for r in results) else None,
        "incremental": [r.arm for r in results if any(t.read_new_seconds is not None for t in r.multi_turn)],
        "rows": tables.comparison_rows(results),
        "smoothing": max(plots.smoothing_window(len(run.metrics)) for run in study.first_seed),
        "groups": [(s, plots.groups_plot(results, s), tables.group_rows(results, s)) for s in splits],
    }


def _side_by_side(study: StudyRuns) -> dict[str, Any]:
    """Returns what a study of one seed and few arms has instead of `large_parts`."""
    return {
        "loss_plots": [plots.loss_plot(study.first_seed, axis) for axis in plots.LOSS_AXES],
        "arms_plot": plots.arms_plot(study.results) if len(study.first_seed) > 2 else None,
    }


def _samples(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    examples = pair_examples(runs)
    errors = [example for example in examples if example.wrong]
    successes = [example for example in examples if not example.wrong]
    return {
        "errors": _sample_rows(errors, ERRORS_SHOWN),
        "successes": _sample_rows(successes, SUCCESSES_SHOWN),
        "wrong": len(errors),
        "samples": len(examples),
    }


def _symbol(index: int) -> str:
    """Returns an arm's marker in the plots as a character, for legends, and its line if that is not solid."""
    marker = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚"}[drawing.marker(index)]
    return marker + {"-": "", "--": "╌", ":": "┈"}[drawing.line(index)]


def _tiles(study: StudyRuns) -> list[dict[str, str]]:
    """Returns the key figures of a few arms: of their only run, or means over seeds."""
    if not is_large(study):
        return [_tile(run, headline(study)) for run in study.first_seed]
    if len(study.first_seed) > FEW_COLUMNS:
        return []
    loss, *scores = measures(study)
    shown = scores[0] if scores else loss
    return [
        {
            "value": mean_cell(runs, shown).split(" ")[0],
            "label": f"{shown.name}, {shown.unit}: {mean_cell(runs, shown)}",
            "lines": f"{len(runs)} seed{'s' * (len(runs) > 1)} · {si(runs[0].result.parameters)} parameters",
        }
        for runs in by_arm(study).values()
    ]


def _tile(run: FinishedRun, headline: str) -> dict[str, str]:
    """Returns an arm's key figures; the large one is the headline metric on the first split, or the validation loss."""
    result = run.result
    whole = next((score for score in result.scores if score.group == "all"), None)
    lines = f"{si(result.parameters)} parameters · {duration(result.train_seconds)} of training"
    loss = f"{result.validation_loss:.4f}"
    if whole is None:
        return {"value": loss, "label": "validation loss, nats per token", "lines": lines}
    if headline == "bleu" and whole.bleu is not None:
        return {
            "value": f"{whole.bleu.value:.1f}",
            "label": f"BLEU, {whole.split} [{whole.bleu.low:.1f}, {whole.bleu.high:.1f}]{_copying_score(whole)}",
            "lines": f"validation loss {loss} · {lines}",
        }
    low, high = whole.exact_match.low, whole.exact_match.high
    return {
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
