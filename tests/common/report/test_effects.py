import dataclasses
import itertools

import numpy as np
import pytest

from common.report.findings import find
from common.report.run_list import Choice
from tests.common.report.studies import finished, study_of

NAMES = {"attention": ("both", "causal"), "stack": ("two", "one")}


def study(effect: float, seeds: int = 5, edge: bool = False, missing: bool = False):
    """Loss 1 + `effect` with one stack + 0.1 with causal attention, and what each seed shares."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.5, seeds)
    runs, chosen = [], {}
    for attention, stack in itertools.product(*NAMES.values()):
        arm = f"{attention}-{stack}"
        chosen[arm] = Choice(rate=1e-3, at_edge=edge and arm == "causal-one", trials=3)
        for seed in range(seeds):
            loss = 2 + effect * (stack == "one") + 0.1 * (attention == "causal") + shared[seed] + rng.normal(0, 0.01)
            labels = {"attention": attention, "stack": stack}
            runs.append(finished(arm, seed=seed, rate=1e-3, labels=labels, validation_loss=float(loss)))
    made = study_of(*(runs[1:] if missing else runs), rates=(5e-4, 1e-3, 2e-3), chosen=chosen)
    made.study["factors"] = list(NAMES)
    return made


def by_name(found) -> dict:
    return {finding.first: finding for finding in found.found if finding.measure.metric == "loss"}


def test_each_factor_is_compared_on_average_over_the_others():
    found = by_name(find(study(effect=0.3)))
    assert list(found) == ["attention=causal", "stack=one", "both or neither of attention=causal and stack=one"]
    stack = found["stack=one"]
    assert stack.second == "stack=two" and stack.compared.difference.value == pytest.approx(0.3, abs=0.02)
    assert stack.resolution.resolved and stack.better == "stack=two"
    both = found["both or neither of attention=causal and stack=one"]
    assert both.compared.difference.value == pytest.approx(0, abs=0.02) and not both.resolution.resolved


def test_an_effect_rests_on_the_tuning_of_every_arm():
    reasons = by_name(find(study(effect=0.3, edge=True)))["stack=one"].resolution.reasons
    assert any("edge" in reason for reason in reasons)


def test_one_seed_resolves_no_effect():
    assert not any(finding.resolution.resolved for finding in find(study(effect=0.3, seeds=1)).found)


def test_a_seed_that_a_cell_lacks_takes_no_part():
    assert by_name(find(study(effect=0.3, missing=True)))["stack=one"].compared.seeds == (1, 2, 3, 4)


def test_an_effect_that_depends_on_search_effort_is_not_resolved():
    """With one stack the best rate is far ahead of the others, with two stacks all are alike."""
    made = study(effect=-0.05)

    def trial(run, rate: float, loss: float):
        labels = {key: value for key, value in run.listed.labels.items() if key in NAMES}
        return finished(run.arm, rate=rate, labels=labels, compared=False, validation_loss=loss)

    firsts = [run for run in made.runs if run.seed == 0]
    others = [
        trial(run, rate, run.result.validation_loss + (2.0 if run.listed.labels["stack"] == "one" else 0.01))
        for run in firsts
        for rate in (5e-4, 2e-3)
    ]
    assert by_name(find(made))["stack=one"].resolution.resolved
    listed = dataclasses.replace(made.listed, runs=(*made.listed.runs, *(run.listed for run in others)))
    found = by_name(find(dataclasses.replace(made, listed=listed, runs=(*made.runs, *others))))
    assert found["stack=one"].resolution.reasons == (
        "the order of stack=one and stack=two depends on search effort: 2 of 3 trials are expected to reverse it",
    )
    assert not any("effort" in reason for reason in found["attention=causal"].resolution.reasons)
