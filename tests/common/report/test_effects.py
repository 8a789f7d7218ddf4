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
