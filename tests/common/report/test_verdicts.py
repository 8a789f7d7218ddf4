"""Verdicts rest on paired examples, or say that they do not."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.analysis.statistics import compare_paired, verdict_line
from common.report.run_files import read_run
from common.report.verdicts import caveat, pair_examples, verdicts

Files = dict[str, Any]


def test_verdict_is_the_paired_comparison_of_all_examples(write_run: Callable[..., Path]) -> None:
    kept: Files = {}
    run = read_run(write_run(kept.update))
    correct = [
        np.array([row["correct"] for row in kept[f"{arm}/samples.jsonl"] if row["split"] == "validation"])
        for arm in ("enc-dec", "dec-only")
    ]
    lines = verdicts(run)
    want = verdict_line("enc-dec", "dec-only", compare_paired(*correct))
    assert lines[0].text == f"Exact match, validation: {want}." and "n = 1,200" in want
    assert lines[0].detail.startswith(f"both right {(correct[0] & correct[1]).sum():,}, only enc-dec")
    assert "unseen names" in lines[2].text and "0.0512" in lines[-1].text
    assert "trained once" in caveat(run) and "2.31 M" in caveat(run)


def test_the_headline_stands_first(write_run: Callable[..., Path]) -> None:
    def by_bleu(files: Files) -> None:
        files["experiment.json"] |= {"evaluation": {"headline": "bleu"}}
        for row in files["dec-only/samples.jsonl"]:
            row["prediction"] = "nothing at all like it"

    exact, bleu = (verdicts(read_run(write_run(change)))[0].text for change in (lambda files: None, by_bleu))
    assert exact.startswith("Exact match, validation") and bleu.startswith("BLEU, validation: enc-dec − dec-only = +")
    assert bleu.endswith("enc-dec is better on these examples.")


def test_the_order_of_samples_does_not_matter(write_run: Callable[..., Path]) -> None:
    plain = verdicts(read_run(write_run()))
    shuffled = verdicts(read_run(write_run(lambda files: random.Random(3).shuffle(files["dec-only/samples.jsonl"]))))
    assert plain == shuffled


def test_a_selection_of_samples_does_not_pass_for_the_split(write_run: Callable[..., Path]) -> None:
    def keep_errors(files: Files) -> None:
        for arm in ("enc-dec", "dec-only"):
            files[f"{arm}/samples.jsonl"] = [row for row in files[f"{arm}/samples.jsonl"] if not row["correct"]]

    for verdict in verdicts(read_run(write_run(keep_errors)))[:2]:
        assert "not compared example by example" in verdict.text and "better" not in verdict.text


def test_repeated_examples_are_paired_in_order(write_run: Callable[..., Path]) -> None:
    def repeat(files: Files) -> None:
        row = {"split": "s", "group": None, "inputs": "i", "target": "t"}
        for arm, right in (("enc-dec", [True, False]), ("dec-only", [False, False])):
            files[f"{arm}/samples.jsonl"] = [row | {"prediction": "", "correct": correct} for correct in right]

    examples = pair_examples(read_run(write_run(repeat)).arms)
    assert [[a.correct for a in e.answers if a] for e in examples] == [[True, False], [False, False]]
    assert [e.wrong for e in examples] == [1, 2]
