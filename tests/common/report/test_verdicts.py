"""Verdicts compare paired examples, or state that they cannot."""

import copy
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.analysis.statistics import compare_paired
from common.report.examples import pair_examples
from common.report.findings import find
from common.report.run_files import StudyRuns, read_study
from common.report.verdicts import Verdict, caveat
from common.report.verdicts import verdicts as all_verdicts
from tests.common.report.conftest import listed, scores_of

Files = dict[str, Any]


def verdicts(study: StudyRuns) -> tuple[Verdict, ...]:
    return all_verdicts(study, find(study))


def test_verdict_is_the_paired_comparison_of_all_examples(write_run: Callable[..., Path]) -> None:
    kept: Files = {}
    run = read_study(write_run(kept.update))
    correct = [
        np.array([row["correct"] for row in kept[f"{arm}/samples.jsonl"] if row["split"] == "validation"])
        for arm in ("enc-dec", "dec-only")
    ]
    lines = verdicts(run)
    compared = compare_paired(*correct)
    assert lines[0].text.startswith("Exact match, validation: enc-dec − dec-only = ") and "n = 1,200" in lines[0].text
    assert f"{100 * compared.difference.value:+.1f} points [" in lines[0].text.replace("−", "-")
    assert f"p = {compared.p_value:.2g} (" in lines[0].text
    assert lines[0].detail.startswith(f"both right {(correct[0] & correct[1]).sum():,}, only enc-dec")
    assert "unseen names" in lines[2].text and "0.0512" in lines[-1].text
    assert "trained once" in caveat(run) and "2.31 M" in caveat(run)


def test_the_headline_metric_comes_first(write_run: Callable[..., Path]) -> None:
    def by_bleu(files: Files) -> None:
        files["study.json"] |= {"evaluation": {"headline": "bleu"}}
        for row in files["dec-only/samples.jsonl"]:
            row["prediction"] = "nothing at all like it"

    exact, bleu = (verdicts(read_study(write_run(change)))[0].text for change in (lambda files: None, by_bleu))
    assert exact.startswith("Exact match, validation") and bleu.startswith("BLEU, validation: enc-dec − dec-only = +")
    assert "the enc-dec model trained here (data.seed 0) is better on these examples than the dec-only model" in bleu


def judged(write_run: Callable[..., Path], *counts: int, splits: int = 1, seeds: dict[str, Any] | None = None) -> Any:
    """Returns verdicts on splits; `counts` examples are right in both arms, one, the other, neither."""

    def edit(files: Files) -> None:
        rights = [(True, True)] * counts[0] + [(True, False)] * counts[1]
        rights += [(False, True)] * counts[2] + [(False, False)] * counts[3]
        for side, arm in enumerate(("enc-dec", "dec-only")):
            files[f"{arm}/config.json"] |= seeds or {}
            answers = {right: {"prediction": "t" if right else "f", "correct": right} for right in (True, False)}
            files[f"{arm}/samples.jsonl"] = rows = [
                {"split": f"s{split}", "group": "g", "inputs": f"{i}", "target": "t", **answers[right[side]]}
                for split in range(splits)
                for i, right in enumerate(rights)
            ]
            scores = [dataclasses.asdict(score) for score in scores_of(rows)]
            files[f"{arm}/result.json"]["scores"] = scores

    return verdicts(read_study(write_run(edit)))


@pytest.mark.parametrize(
    ("counts", "better"),
    [
        ((900, 60, 20, 20), "enc-dec"),
        ((900, 20, 60, 20), "dec-only"),
        ((900, 40, 40, 20), None),
        ((1000, 0, 0, 0), None),
        ((90, 4, 0, 6), None),
    ],
)
def test_verdicts_are_about_these_examples_and_this_seed(
    write_run: Callable[..., Path], counts: tuple[int, ...], better: str | None
) -> None:
    seeds = {"train": {"seed": 3}, "data": {"seed": 4}}
    exact, counted, unresolved, _ = judged(write_run, *counts, seeds=seeds)
    assert f"n = {sum(counts):,}" in exact.text and counted.text == "This report makes 1 comparison."
    assert unresolved.text == (
        "No difference between the arms is resolved: 1 paired seed, at least 3 are needed; enc-dec was not tuned; "
        "dec-only was not tuned."
    )
    if better is None:
        assert exact.text.endswith("no difference resolved.") and "[+0.0, +0.0]" not in exact.text
    else:
        assert f"the {better} model trained here (train.seed 3, data.seed 4) is better on these examples" in exact.text
        worse = {"enc-dec": "dec-only", "dec-only": "enc-dec"}[better]
        assert exact.text.endswith(f"one seed says nothing about {better} and {worse} in general.")


def test_p_values_are_corrected_for_the_number_of_comparisons(write_run: Callable[..., Path]) -> None:
    """p = 0.021 is a difference for one comparison, but not for one of six."""
    (alone, *_), (among, *_, counted, _, _) = (judged(write_run, 80, 13, 3, 4, splits=n) for n in (1, 6))
    assert "the enc-dec model trained here (data.seed 0) is better" in alone.text
    assert "(p = 0.13 corrected for 6 comparisons): no difference resolved" in among.text
    assert counted.text.startswith("This report makes 6 comparisons")


@pytest.mark.parametrize(
    ("arms", "tokenizer", "why"),
    [
        (["dec-only"], "zh", "they were scored in different ways (nrefs:1|"),
        (["enc-dec", "dec-only"], "ja-mecab-0.996-IPA", "they were scored with MeCab, which is not installed here"),
    ],
)
def test_incomparable_bleu_scores_are_not_compared(
    write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, arms: list[str], tokenizer: str, why: str
) -> None:
    def edit(files: Files) -> None:
        for arm in arms:
            files[f"{arm}/result.json"]["scores"][0]["bleu_signature"] = f"nrefs:1|tok:{tokenizer}"

    monkeypatch.setattr("common.evals.bleu.has_mecab", lambda: False)
    line = verdicts(read_study(write_run(edit)))[1]
    assert f"BLEU, validation: enc-dec and dec-only are not compared, since {why}" in line.text


def test_the_order_of_samples_does_not_matter(write_run: Callable[..., Path]) -> None:
    plain = verdicts(read_study(write_run()))
    shuffled = verdicts(read_study(write_run(lambda files: random.Random(3).shuffle(files["dec-only/samples.jsonl"]))))
    assert plain == shuffled


def test_a_selection_of_samples_is_not_compared_as_the_split(write_run: Callable[..., Path]) -> None:
    def keep_errors(files: Files) -> None:
        for arm in ("enc-dec", "dec-only"):
            files[f"{arm}/samples.jsonl"] = [row for row in files[f"{arm}/samples.jsonl"] if not row["correct"]]

    for verdict in verdicts(read_study(write_run(keep_errors)))[:2]:
        assert "not compared example by example" in verdict.text and "better" not in verdict.text


def test_a_split_that_only_a_later_arm_was_scored_on_is_no_comparison(write_run: Callable[..., Path]) -> None:
    """An arm and a split may be added to a finished comparison, whose other arms are not scored again at once."""

    def add(files: Files) -> None:
        for path in [path for path in files if path.startswith("dec-only/")]:
            files[path.replace("dec-only", "third")] = copy.deepcopy(files[path])
        files["third/result.json"]["arm"] = "third"
        files["runs.json"]["runs"].append(listed("third"))
        for arm in ("enc-dec", "dec-only"):
            for rows in (files[f"{arm}/result.json"]["scores"], files[f"{arm}/samples.jsonl"]):
                rows[:] = [row for row in rows if row["split"] != "unseen names"]

    texts = [verdict.text for verdict in verdicts(read_study(write_run(add)))]
    assert [text for text in texts if "unseen names" in text] == [
        "Exact match, unseen names: enc-dec and third are not compared example by example: "
        "samples.jsonl pairs 0 of 0 and 400 examples."
    ]


def test_repeated_examples_are_paired_in_order(write_run: Callable[..., Path]) -> None:
    def repeat(files: Files) -> None:
        row: Files = {"split": "s", "group": None, "inputs": "i", "target": "t"}
        for arm, right in (("enc-dec", [True, False]), ("dec-only", [False, False])):
            files[f"{arm}/samples.jsonl"] = [row | {"prediction": "", "correct": correct} for correct in right]

    examples = pair_examples(read_study(write_run(repeat)).first_seed)
    assert [[a.correct for a in e.answers if a] for e in examples] == [[True, False], [False, False]]
    assert [e.wrong for e in examples] == [1, 2]
