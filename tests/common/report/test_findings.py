"""Only a fair, tuned difference over seeds is resolved; every other one says in words why it is not."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.analysis.seeds import compare_seeds, crossed_interval, t_interval
from common.evals.text_metrics import score_texts
from common.report.claims import Parity
from common.report.findings import Findings, Measure, find
from common.report.run_files import FinishedRun, ScoredSample, StudyRuns, read_study
from common.report.run_list import Choice
from common.report.verdicts import caveat, verdicts
from tests.common.report.studies import RATE, finished, study_of

RATES = (RATE / 2, RATE, RATE * 2)
EVERY_ARM = Parity()
TUNED = Choice(rate=RATE, at_edge=False, trials=3)


def losses(difference: float, seeds: int) -> dict[str, list[float]]:
    """Makes validation losses that vary far more over seeds than over arms, as paired data do."""
    rng = np.random.default_rng(0)
    common = rng.normal(2, 0.3, seeds)
    return {"a": list(common + rng.normal(0, 0.01, seeds)), "b": list(common + difference + rng.normal(0, 0.01, seeds))}


def made(
    by_arm: Mapping[str, Sequence[float]], chosen: Mapping[str, Choice] | None = None, **changes: Any
) -> StudyRuns:
    """Makes a searched study with one loss for each arm and seed; `changes` replace fields of b's results."""
    runs = [
        finished(arm, seed=seed, validation_loss=loss, **(changes if arm == "b" else {}))
        for arm, values in by_arm.items()
        for seed, loss in enumerate(values)
    ]
    return study_of(*runs, rates=RATES, chosen=dict.fromkeys(by_arm, TUNED) if chosen is None else chosen)


def reasons(study: StudyRuns) -> tuple[str, ...]:
    (finding,) = find(study).found
    return finding.resolution.reasons


def test_a_true_difference_over_five_seeds_is_resolved() -> None:
    by_arm = losses(0.1, seeds=5)
    (finding,) = find(made(by_arm)).found
    compared = compare_seeds(dict(enumerate(by_arm["a"])), dict(enumerate(by_arm["b"])))
    assert finding.resolution.resolved and finding.better == "a" and finding.compared == compared
    difference = compared.difference
    assert finding.sentence.replace("−", "-") == (
        f"Validation loss: a - b = {difference.value:.4f} [{difference.low:.4f}, {difference.high:.4f}] "
        f"nats per token, n = 5 seeds, p = {compared.p_value:.2g} after correction; resolved: a is better."
    )
    assert (
        finding.detail
        == f"5 seeds with this spread show a difference of {compared.smallest:.4f} nats per token "
        + ("in 4 of 5 cases")
    )


@pytest.mark.parametrize(
    ("study", "reason"),
    [
        (made(losses(0.1, 1)), "1 paired seed, at least 3 are needed"),
        (made(losses(0.1, 2)), "2 paired seeds, at least 3 are needed"),
        (made(losses(0.0, 5)), "the t interval over 5 seeds contains 0"),
        (made(losses(0.1, 5), chosen={"a": TUNED}), "b was not tuned"),
        (
            made(losses(0.1, 5), chosen={"a": TUNED, "b": dataclasses.replace(TUNED, at_edge=True)}),
            "b's best trial lies at the edge of its search in learning rate, which must be extended",
        ),
        (
            made(losses(0.1, 5), chosen={"a": TUNED, "b": dataclasses.replace(TUNED, trials=5)}),
            "a had 3 trials, b 5",
        ),
        (made(losses(0.1, 5), fingerprint="1"), "the arms differ in “same data in the same order”"),
        (made(losses(0.1, 5), steps=100), "the arms differ in “same steps, examples and tokens”"),
        (made(losses(0.1, 5), xla_flops_per_step=1e12), "the arms differ in “ledger = XLA within 2 %”"),
    ],
)
def test_the_same_difference_is_not_resolved_where_one_thing_is_wrong(study: StudyRuns, reason: str) -> None:
    assert reason in reasons(study)
    (finding,) = find(study).found
    assert finding.answer.startswith("not resolved: ") and reason in finding.sentence


def test_without_a_search_no_arm_is_tuned() -> None:
    runs = [finished(arm, seed=s, validation_loss=x) for arm, v in losses(0.1, 5).items() for s, x in enumerate(v)]
    assert reasons(study_of(*runs)) == ("a was not tuned", "b was not tuned")


def test_another_grid_is_another_search() -> None:
    study = made(losses(0.1, 5))
    wider = finished("b", rate=RATE * 4, compared=False)
    assert any(
        reason.startswith("the searches differ: learning_rate 0.001..0.004")
        for reason in reasons(
            dataclasses.replace(
                study, listed=dataclasses.replace(study.listed, runs=(*study.listed.runs, wider.listed))
            )
        )
    )


def test_a_diverged_run_is_never_dropped_in_silence() -> None:
    by_arm = losses(0.1, seeds=6)
    by_arm["b"][2] = float("inf")
    (finding,) = find(made(by_arm)).found
    assert finding.compared.seeds == (0, 1, 3, 4, 5)
    assert finding.resolution.reasons == ("the arms differ in which runs diverged (b-lr0.002-s2)",)
    assert "seeds that only one arm has: 2" in finding.detail


def test_arms_without_a_common_seed_are_not_compared() -> None:
    study = study_of(finished("a", seed=0), finished("b", seed=1))
    found = find(dataclasses.replace(study, parity=(Parity(),)))
    assert found == Findings(found=(), uncompared=())  # they are in no group


def test_pairs_within_the_groups_of_claims() -> None:
    """Every pair of up to four arms; more are compared with the first. Arms of different groups are not compared."""

    def pairs(count: int, parity: Parity = EVERY_ARM) -> list[str]:
        runs = [
            finished(f"{i}", seed=seed, labels={"even": i % 2, "i": i}, validation_loss=i + seed / 9)
            for i in range(count)
            for seed in (0, 1, 2)
        ]
        return [finding.first + finding.second for finding in find(study_of(*runs, parity=[parity])).found]

    assert pairs(2) == ["01"] and pairs(4) == ["01", "02", "03", "12", "13", "23"]
    assert pairs(6) == ["01", "02", "03", "04", "05"]
    assert pairs(5, Parity(over=("i",))) == ["02", "04", "24", "13"]


def test_runs_are_in_the_order_of_the_arms(write_run: Callable[..., Path]) -> None:
    """Those of a search are listed by rate, so that the order of two arms could be another for each seed."""

    def by_rate(files: dict[str, Any]) -> None:
        files["runs.json"]["runs"].reverse()

    assert [run.arm for run in read_study(write_run(by_rate)).runs] == ["enc-dec", "dec-only"]


def scored(arm: str, seed: int, correct_E: np.ndarray, shift: int = 0) -> FinishedRun:
    samples = [
        ScoredSample(split="test", inputs=f"{i + shift}", target="t", prediction="t" if c else "f", correct=bool(c))
        for i, c in enumerate(correct_E)
    ]
    scores = score_texts([s.prediction for s in samples], [s.target for s in samples], None, "test")
    return finished(arm, seed=seed, samples=samples, scores=tuple(scores))


def answers(share: float, rng: np.random.Generator, hard_E: np.ndarray) -> np.ndarray:
    return (rng.random(len(hard_E)) < 0.2 * share + 0.7 * share * ~hard_E).astype(bool)


def test_scores_are_compared_over_seeds_and_examples() -> None:
    """Against the same numbers by hand; where runs answered other examples, over seeds alone."""
    rng = np.random.default_rng(1)
    hard_E = rng.random(300) < 0.4
    correct = {arm: [answers(share, rng, hard_E) for _ in range(4)] for arm, share in (("a", 1.0), ("b", 0.8))}
    runs = [scored(arm, seed, c) for arm, by_seed in correct.items() for seed, c in enumerate(by_seed)]
    chosen = dict.fromkeys("ab", TUNED)
    loss, score = find(study_of(*runs, rates=RATES, chosen=chosen)).found
    difference_SE = 100 * (np.array(correct["a"], float) - np.array(correct["b"], float))
    assert loss.crossed is None and score.measure == Measure(metric="exact_match", split="test")
    assert score.compared.difference.value == pytest.approx(t_interval(difference_SE.mean(axis=1)).value)
    assert score.crossed is not None
    expected = crossed_interval(difference_SE)
    assert (score.crossed.low, score.crossed.high) == pytest.approx((expected.low, expected.high))
    assert score.better == "a" and "for other seeds and other examples +" in score.detail
    others = [scored("b", seed, c, shift=1) for seed, c in enumerate(correct["b"])]
    _, alone = find(study_of(*runs[:4], *others, rates=RATES, chosen=chosen)).found
    assert alone.crossed is None and alone.compared == score.compared


def test_bleu_scored_in_different_ways_is_not_compared() -> None:
    runs = []
    for arm, signature in (("a", "tok:13a"), ("b", "tok:zh")):
        for seed in range(3):
            run = scored(arm, seed, np.ones(50, bool))
            (score, *_) = run.result.scores
            score = dataclasses.replace(score, bleu=score.exact_match, bleu_signature=signature)
            result = dataclasses.replace(run.result, scores=(score,))
            runs.append(dataclasses.replace(run, result=result, config={"evaluation": {"headline": "bleu"}}))
    found = find(study_of(*runs))
    assert [finding.measure.metric for finding in found.found] == ["loss"]
    assert found.uncompared == ("BLEU, test: a and b are not compared, since they were scored in different ways.",)


def test_sentences_over_seeds_count_what_is_resolved() -> None:
    study = made(losses(0.1, 5) | {"c": losses(0.1, 5)["a"]})
    lines = [verdict.text for verdict in verdicts(study, find(study))]
    assert lines[0] == "2 of 3 comparisons over seeds resolved; p-values are corrected for their number (Holm)."
    assert [line.endswith("is better.") for line in lines[1:]] == [True, True, False]
    assert "trained once" not in caveat(study) and "other seeds and data orders" in caveat(study)


def test_one_seed_says_something_of_two_trained_models_only() -> None:
    rng = np.random.default_rng(0)
    runs = [scored(arm, 0, rng.random(400) < share) for arm, share in (("a", 0.9), ("b", 0.2))]
    study = study_of(*runs, rates=RATES, chosen=dict.fromkeys("ab", TUNED))
    exact, _, unresolved, _ = [verdict.text for verdict in verdicts(study, find(study))]
    assert exact.endswith(
        "the a model trained here is better on these examples than the b model; one seed says nothing about a and b "
        "in general."
    )
    assert unresolved == "No difference between the arms is resolved: 1 paired seed, at least 3 are needed."
