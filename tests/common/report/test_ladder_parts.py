"""The parts of a report on several ordered arms: their descriptions, one drawing, the cost of a conversation."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.report.certificate import certify
from common.report.html import write_figure, write_report
from common.report.run_files import read_study
from tests.common.report.conftest import listed

Files = dict[str, Any]
EVIL = "<b>not bold</b> $x^2$ {{ 7*7 }}"


def three_arms(files: Files) -> None:
    """Adds a third arm, descriptions, and conversations in which only the last arm keeps its cache."""
    arms = files["study.json"]["arms"]
    arms["third"] = arms["dec-only"]
    files |= {name.replace("dec-only", "third"): value for name, value in files.items() if name.startswith("dec-only/")}
    files["runs.json"]["runs"].append(listed("third"))
    files["third/result.json"] = {**files["third/result.json"], "arm": "third"}
    for i, arm in enumerate(arms):
        files[f"{arm}/config.json"] = {**files[f"{arm}/config.json"], "about": f"{EVIL} {i}"}
        new = 0.01 if arm == "third" else None
        files[f"{arm}/result.json"]["multi_turn"] = [
            {"turn": t, "history_tokens": 128 * t, "read_again_seconds": 0.02 * t, "read_new_seconds": new}
            for t in range(1, 4)
        ]


def test_arms_are_shown_in_order(write_run: Callable[..., Path]) -> None:
    page = write_report(write_run(three_arms)).read_text(encoding="utf-8")
    assert EVIL not in page
    assert all(f"&lt;b&gt;not bold&lt;/b&gt; $x^2$ {{{{ 7*7 }}}} {i}" in page for i in range(3))
    assert "(third)" in page and "no arm can" not in page
    drawing = re.search(r'aria-label="arm by arm".*?</svg>', page, flags=re.DOTALL)
    assert drawing is not None and [name for name in ("enc-dec", "dec-only", "third") if name in drawing[0]] == [
        *("enc-dec", "dec-only", "third")
    ]


def test_two_plain_arms_have_no_such_parts(write_run: Callable[..., Path]) -> None:
    page = write_report(write_run()).read_text(encoding="utf-8")
    assert "arm by arm" not in page and "conversation" not in page


def test_figure_is_a_separate_file(write_run: Callable[..., Path], tmp_path: Path) -> None:
    figure = tmp_path / "figure.svg"
    write_figure(write_run(three_arms), figure)
    text = figure.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and "var(" not in text
    words = "".join(root.itertext())
    assert all(name in words for name in ("enc-dec", "dec-only", "third"))
    write_figure(tmp_path / "run", figure)
    assert figure.read_text(encoding="utf-8") == text


def test_figure_of_several_seeds_shows_each_of_them(write_run: Callable[..., Path], tmp_path: Path) -> None:
    def add_seeds(files: Files) -> None:
        for arm, seed in itertools.product(("enc-dec", "dec-only"), (1, 2)):
            name = f"{arm}-s{seed}"
            labels = {"arm": arm, "seed": seed, "learning_rate": 2e-3}
            files["runs.json"]["runs"].append(listed(arm, name=name, folder=name, seed=seed, labels=labels))
            files |= {path.replace(f"{arm}/", f"{name}/"): v for path, v in files.items() if path.startswith(f"{arm}/")}

    figure, folder = tmp_path / "figure.svg", write_run(add_seeds)
    write_figure(folder, figure)
    words = "".join(ElementTree.fromstring(figure.read_text(encoding="utf-8")).itertext())
    assert "validation loss, nats per token" in words and "exact match, unseen names, points" in words
    assert words.count("enc-dec") == words.count("dec-only") == 1
    page = write_report(folder).read_text(encoding="utf-8")
    assert "enc-dec was not tuned" in page and "in each of 3 groups of runs" in page


@pytest.mark.parametrize("declared", [True, False])
def test_only_fields_that_the_claim_takes_apart_may_differ(write_run: Callable[..., Path], declared: bool) -> None:
    def edit(files: Files) -> None:
        three_arms(files)
        files["third/config.json"] = {**files["third/config.json"]}
        files["third/config.json"]["model"] = {**files["third/config.json"]["model"], "norm": "layer"}
        files["study.json"]["parity"] = [{"apart": ["model.n*"] if declared else []}]

    recipe = next(check for check in certify(read_study(write_run(edit))).checks if check.name == "one recipe")
    assert recipe.agrees == declared
    assert "norm" in recipe.detail
