"""The terminal's tables have every row, readable units, and names as text, never as markup."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from common.report.run_files import read_study
from common.report.tables import comparison_rows, comparison_table, group_rows, groups_table
from tests.common.report.studies import result_of


def shown(renderable: Any) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(renderable)
    return console.export_text()


def line(text: str, label: str) -> list[str]:
    (found,) = [row for row in text.splitlines() if row.strip().startswith(label)]
    return found.split()


def test_comparison_table_has_every_row(write_run: Callable[..., Path]) -> None:
    results = read_study(write_run()).results
    text = shown(comparison_table(results))
    assert line(text, "parameters") == ["parameters", "2.31", "M", "2.27", "M"]
    assert line(text, "training FLOPs")[2:4] == ["4.10e14", "4.10e14"]
    assert line(text, "tokens seen")[2:6] == ["876", "k", "876", "k"]
    assert line(text, "tokens with loss")[3:5] == ["372", "k"]
    assert line(text, "fill")[1:6] == ["94.0", "%", "/", "88.0", "%"]
    assert line(text, "validation loss")[2:4] == ["0.0512", "0.0542"]
    assert line(text, "waiting for data")[3:5] == ["0.4", "%"]
    score = results[0].scores[0]
    assert score.bleu is not None
    interval = f"{100 * score.exact_match.value:.1f} % [{100 * score.exact_match.low:.1f}"
    assert interval in text and f"{score.bleu.value:.1f} [{score.bleu.low:.1f}" in text
    assert "BLEU, unseen names" not in text  # two words per text have no 4-grams
    for row in comparison_rows(results):
        assert len(row.values) == 2 and row.label in text


def test_groups_are_complete_and_best_first(write_run: Callable[..., Path]) -> None:
    results = read_study(write_run()).results
    rows = group_rows(results, "validation")
    values = {s.group: s.exact_match.value for s in results[0].scores if s.split == "validation" and s.group != "all"}
    assert [row.label for row in rows] == sorted(values, key=lambda name: (-values[name], name))
    assert group_rows(results, "unseen names") == ()  # of one kind only, which is the whole split
    text = shown(groups_table(results))
    assert "validation: all" in text and "unseen names: all" in text and "n = 400" in text


def test_arms_without_some_scores_have_a_dash(write_run: Callable[..., Path]) -> None:
    scored = read_study(write_run()).results[0]
    rows = comparison_rows([scored, result_of("b")])
    (exact,) = [row for row in rows if row.label == "exact match, validation"]
    assert exact.values[1] == "–" and exact.values[0] != "–"
    assert not [row for row in comparison_rows([result_of("b")]) if "exact" in row.label]


def test_names_from_data_are_not_markup(write_run: Callable[..., Path]) -> None:
    result = read_study(write_run()).results[0]
    scores = tuple(dataclasses.replace(s, group=s.group.replace("dates", "[bold]dates[/]")) for s in result.scores)
    odd = dataclasses.replace(result, arm="[red]x[/red]", scores=scores)
    assert "[red]x[/red]" in shown(comparison_table([odd]))
    assert "[bold]dates[/]" in shown(groups_table([odd]))


def test_control_characters_in_names_are_escaped(write_run: Callable[..., Path]) -> None:
    result = read_study(write_run()).results[0]
    evil, seen = "\x1b[2J\x9b\u202e", r"\u001b[2J\u009b\u202e"
    scores = tuple(dataclasses.replace(s, group=s.group.replace("dates", f"dates{evil}")) for s in result.scores)
    odd = dataclasses.replace(result, arm=f"x{evil}", scores=scores)
    for table, names in ((comparison_table([odd]), [f"x{seen}"]), (groups_table([odd]), [f"x{seen}", f"dates{seen}"])):
        text = shown(table)
        assert all(name in text for name in names) and not set(evil) - set("[2J") & set(text)
