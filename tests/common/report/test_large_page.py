"""The page of a study with several seeds, many arms or a search; everything from data is escaped."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from common.analysis.effort import expected_best, expected_of_best
from common.analysis.seeds import t_interval
from common.report.certificate import certify
from common.report.findings import Measure, find
from common.report.html import render
from common.report.run_files import StudyRuns
from common.report.run_list import Choice, Trial
from common.report.search import ArmTrials, by_effort, reversals, trials_of, tuning
from common.report.study_page import arms_table, columns, is_large, mean_cell
from tests.common.report.studies import finished, study_of
from tests.common.report.test_html import Page

EVIL = "<b>$x^2$</b>"
RATES = (1e-3, 2e-3, 4e-3)
LOSS = Measure(metric="loss")
DECAY = "train.optimizer.weight_decay"


def searched(seeds: int = 3) -> StudyRuns:
    """Makes two arms, `a` best at the middle rate with any effort, `b` at the edge."""
    found = {"a": (1.2, 1.0, 1.4), EVIL: (1.1, 1.05, 1.02)}
    runs = [
        finished(arm, rate=rate, seed=seed, validation_loss=losses[i] + seed / 50, chain="01", compared=i == best)
        for (arm, losses), best in zip(found.items(), (1, 2), strict=True)
        for i, rate in enumerate(RATES)
        for seed in range(seeds if i == best else 1)
    ]
    chosen = {"a": Choice(rate=2e-3, at_edge=False, trials=3), EVIL: Choice(rate=4e-3, at_edge=True, trials=3)}
    study = study_of(*runs, rates=RATES, chosen=chosen)
    return dataclasses.replace(study, listed=dataclasses.replace(study.listed, overrides=("seeds=3", EVIL)))


def test_page_of_a_searched_study() -> None:
    study = searched()
    text = render(study)
    page = Page(text)
    assert page.open == [] and page.tags["b"] == 0 and "<script" not in text and max(page.ids.values()) == 1
    assert {target[1:] for target in re.findall(r"url\(([^)]*)\)", text)} <= set(page.ids)
    assert page.tags["svg"] == 3 + 1 + 1 + 2
    for part in (
        *(
            "seeds=3 " + EVIL,
            "0 of 1 comparison over seeds resolved",
            "Comparisons",
            "learning rate at the edge: not tuned",
            "left: the first is better",
        ),
        *(f"{EVIL}'s best trial lies at the edge", "0.001, 0.002, 0.004", "expected best validation loss"),
        *("in each of 3 groups of runs", "1.0200 [0.9703, 1.0697]", "Each arm trained with its first seed."),
    ):
        assert part in page.text, part
    assert render(study) == text


def test_a_small_study_keeps_its_columns() -> None:
    one_seed = searched(seeds=1)
    assert not is_large(one_seed) and "Side by side: one run" not in render(one_seed)
    assert is_large(searched(seeds=2))
    many = study_of(*[finished(f"arm {i}", chain="01", validation_loss=1 + i) for i in range(16)])
    assert is_large(many) and len(columns(many)) == 4 and not is_large(study_of(*many.runs[:6]))
    page = Page(render(many))
    assert "The first 4 of 16 arms" in page.text and page.open == [] and "Comparisons" in page.text


def test_means_have_intervals_from_three_seeds_on() -> None:
    losses = (1.0, 1.2, 1.1, 1.4)
    runs = [finished("a", seed=i, validation_loss=loss) for i, loss in enumerate(losses)]
    mean = t_interval(np.array(losses))
    assert mean_cell(runs, LOSS) == f"{mean.value:.4f} [{mean.low:.4f}, {mean.high:.4f}]"
    assert mean_cell(runs[:2], LOSS) == "1.1000 (1.0000, 1.2000)" and mean_cell(runs[:1], LOSS) == "1.0000"
    assert mean_cell(runs, Measure(metric="bleu", split="test")) == "–"


def test_the_terminal_has_a_row_for_each_arm() -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(arms_table(searched()))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["a", "3", "0.002", "2.31", "M", "1.0200", "[0.9703,", "1.0697]"] in lines
    assert [EVIL, "3", "0.004", "(edge)", "2.31", "M", "1.0400", "[0.9903,", "1.0897]"] in lines


def test_trials_are_the_search_and_not_the_further_seeds() -> None:
    first, second = trials_of(searched())
    assert {trial.rate: losses for trial, losses in first.losses.items()} == {1e-3: [1.2], 2e-3: [1.0], 4e-3: [1.4]}
    assert second.arm == EVIL
    assert first.expected_best == pytest.approx(list(expected_best([1.2, 1.0, 1.4])))
    assert trials_of(study_of(finished("a"))) == ()


def test_an_order_that_depends_on_effort_is_named() -> None:
    """a's best is lower, but of one rate at random b's is: 1.2 against 1.06; of two, 1.07 against 1.03."""
    study, pair = searched(), [("a", EVIL)]
    (sentence,) = reversals(trials_of(study), pair)
    assert sentence == (
        f"a has the lower best loss of a and {EVIL}, but with 1, 2 of 3 trials the other one is expected to be ahead."
    )
    (finding,) = find(study).found
    reason = f"the order of a and {EVIL} depends on search effort: 2 of 3 trials are expected to reverse it"
    assert reason in finding.resolution.reasons and reason in Page(render(study)).text

    def of_other(*losses: float) -> list[ArmTrials]:
        return [
            dataclasses.replace(arm, losses={trial: [x] for trial, x in zip(arm.losses, losses, strict=False)})
            if arm.arm != "a"
            else arm
            for arm in trials_of(study)
        ]

    assert list(reversals(of_other(3.0, 3.0, 3.0), pair)) == []
    assert list(reversals(of_other(3.0), pair)) == [f"a and {EVIL} have 3 and 1 trials."]
    (sentence,) = reversals(of_other(1.1, 1.15, 1.15), pair)
    assert sentence.endswith(
        "with 1 of 3 trials the other one is expected to be ahead, too few to count against a difference."
    )


def test_a_score_by_effort_is_that_of_the_trials_with_the_lowest_loss() -> None:
    study = searched()
    means = {"a": [1.2, 1.0, 1.4], EVIL: [1.1, 1.05, 1.02]}
    for arm, losses in means.items():
        found = by_effort(study, arm, lambda run: -run.rate, worst=0.0)
        assert found == pytest.approx(list(expected_of_best(losses, [-rate for rate in RATES])))
        assert by_effort(study, arm, LOSS.of, worst=math.inf) == pytest.approx(list(expected_best(losses)))
    assert by_effort(study, "a", lambda run: None, worst=0.0) == ()
    lost = dataclasses.replace(study.runs[0].listed, diverged=True)
    listed = dataclasses.replace(study.listed, runs=(lost, *study.listed.runs[1:]))
    study = dataclasses.replace(study, listed=listed, runs=study.runs[1:])
    assert by_effort(study, "a", LOSS.of, worst=math.inf) == pytest.approx((math.inf, (1.0 + 1.0 + 1.4) / 3, 1.0))
    study = dataclasses.replace(study, listed=dataclasses.replace(study.listed, chosen={}))
    assert by_effort(study, "a", LOSS.of, worst=math.inf) == ()


def test_a_diverged_trial_is_neither_drawn_nor_chosen() -> None:
    study = searched()
    run = study.runs[0]
    wild = dataclasses.replace(run, result=dataclasses.replace(run.result, validation_loss=math.inf))
    study = dataclasses.replace(study, runs=(wild, *study.runs[1:]))
    assert trials_of(study)[0].means[Trial(rate=1e-3)] == math.inf and trials_of(study)[0].expected_best[2] == 1.0
    assert not re.search(r"\b(nan|inf)\b", Page(render(study)).text)


def of_two(draws: int | None = None, best: float = 0.1) -> StudyRuns:
    """Makes a study whose search also tried weight decays, among them 0."""
    runs = [
        finished(
            arm,
            rate=rate,
            tried={DECAY: decay},
            validation_loss=1 + abs(rate - 2e-3) + abs(decay - best) + i / 10,
            chain="01",
            compared=(rate, decay) == (2e-3, best),
            config={"train": {"optimizer": {"weight_decay": decay + i / 10}}},
        )
        for i, arm in enumerate("ab")
        for rate in RATES
        for decay in (0.0, 0.1, 0.2)
    ]
    choice = Choice(
        rate=2e-3, also={DECAY: best}, at_edge=best == 0.2, edges=("weight_decay",) * (best == 0.2), trials=9
    )
    study = study_of(*runs, rates=RATES, chosen=dict.fromkeys("ab", choice))
    also = [{"kind": "values", "path": DECAY, "values": [0.0, 0.1, 0.2]}]
    search = {**study.study["search"], "also": also, "draws": draws}
    return dataclasses.replace(study, study={**study.study, "search": search})


def test_a_search_of_several_hyperparameters() -> None:
    study = of_two()
    assert [run.listed.tried for run in study.compared] == [{DECAY: 0.1}] * 2
    assert [len(arm.losses) for arm in trials_of(study)] == [9, 9]
    page = Page(text := render(study))
    assert page.open == [] and page.tags["svg"] == 3 + 3 and render(study) == text
    assert "0.002, weight_decay 0.1" in page.text and "not tuned" not in page.text
    assert "learning rate 0.001 to 0.004, weight_decay 0 to 0.2" in page.text
    assert "weight_decay at the edge: not tuned" in Page(render(of_two(best=0.2))).text
    tuned = tuning(study, "a")
    assert tuned is not None and tuned.trials == 9 and tuned.edges == ()
    assert tuned.space == "learning_rate 0.001..0.004, weight_decay 0 or 0.1 or 0.2, mean validation loss over 1 seed"
    drawn = tuning(of_two(draws=9, best=0.2), "a")
    assert drawn is not None and drawn.space.startswith("9 random draws of learning_rate")
    assert drawn.edges == ("weight_decay",)


def test_what_the_search_tunes_is_no_difference_of_recipe() -> None:
    """As the learning rate is none; without the search it is one."""
    study = of_two()
    recipe = {check.name: check.agrees for check in certify(study).checks}
    assert recipe["one recipe"] is True
    runs = [dataclasses.replace(run, listed=dataclasses.replace(run.listed, tried={})) for run in study.compared]
    assert {check.name: check.agrees for check in certify(study_of(*runs)).checks}["one recipe"] is False


def test_a_trial_that_diverged_counts_though_it_has_no_result() -> None:
    study = searched()
    lost = dataclasses.replace(study.runs[0].listed, diverged=True)
    listed = dataclasses.replace(study.listed, runs=(lost, *study.listed.runs[1:]))
    study = dataclasses.replace(study, listed=listed, runs=study.runs[1:])
    assert trials_of(study)[0].means == {Trial(rate=1e-3): math.inf, Trial(rate=2e-3): 1.0, Trial(rate=4e-3): 1.4}
