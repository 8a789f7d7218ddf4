import dataclasses

import pytest

from common.errors import UserError
from common.report.claims import Parity
from common.train.config import Budget
from experiments.first_light import first_light
from experiments.run import After, identity

STUDY = first_light()


def with_width(run, width):
    return dataclasses.replace(run, labels={**run.labels, "width": width})


WIDE = dataclasses.replace(
    STUDY,
    arms={f"{name}-{width}": with_width(run, width) for name, run in STUDY.arms.items() for width in (64, 128)},
    parity=(Parity(over=("family",)),),
)


def test_a_parity_claim_holds_within_groups_of_equal_other_labels():
    assert WIDE.groups(WIDE.parity[0]) == [["t5like-64", "gpt-64"], ["t5like-128", "gpt-128"]]
    assert WIDE.groups(Parity()) == [list(WIDE.arms)]


def test_arms_are_selected_by_labels_and_patterns():
    assert list(WIDE.selected({"family": ["gpt"]}).arms) == ["gpt-64", "gpt-128"]
    assert list(WIDE.selected({"family": ["gpt"], "width": ["128"]}).arms) == ["gpt-128"]
    assert list(WIDE.selected({"arm": ["*-64"]}).arms) == ["t5like-64", "gpt-64"]
    with pytest.raises(UserError, match="no arm has width=9; there are width=128,64"):
        WIDE.selected({"width": ["9"]})


def test_a_selected_arm_brings_the_arm_that_it_starts_from():
    later = dataclasses.replace(STUDY.arms["gpt"], after=After(arm="gpt"), labels={})
    study = dataclasses.replace(STUDY, arms={**STUDY.arms, "later": later})
    assert list(study.selected({"arm": ["later"]}).arms) == ["gpt", "later"]


def test_budgets_in_flops_become_the_steps_of_the_most_expensive_arm():
    flops = STUDY.edited(
        lambda run: dataclasses.replace(
            run, train=dataclasses.replace(run.train, budget=Budget(unit="flops", amount=1e14))
        )
    )
    most = max(run.flops_per_step for run in flops.arms.values())
    assert {run.steps for run in flops.equal_steps().arms.values()} == {int(1e14 // most)}
    apart = dataclasses.replace(flops, parity=(Parity(steps=False),)).equal_steps()
    assert len({run.steps for run in apart.arms.values()}) == 2


def test_an_unknown_label_in_a_claim_is_refused():
    with pytest.raises(UserError, match=r"parity\.over: no arm has the label 'familly': did you mean 'family'"):
        dataclasses.replace(STUDY, parity=(Parity(over=("familly",)),))


def test_labels_that_every_run_gets_are_reserved():
    arm = dataclasses.replace(STUDY.arms["gpt"], labels={"seed": 1})
    with pytest.raises(UserError, match=r"arms\.gpt\.labels has 'seed'"):
        dataclasses.replace(STUDY, arms={"gpt": arm}, parity=())


def test_factors_are_labels_with_two_values_whose_combinations_are_the_arms():
    both = dataclasses.replace(WIDE, factors=("family", "width"))
    assert both.factors == ("family", "width")
    with pytest.raises(UserError, match="'width' must be a label with two values in all arms; it has 64"):
        dataclasses.replace(
            WIDE, arms={name: with_width(run, 64) for name, run in WIDE.arms.items()}, factors=("width",)
        )
    few = {name: run for name, run in WIDE.arms.items() if name != "gpt-128"}
    with pytest.raises(UserError, match="the arms have 3 combinations of family, width in 3 arms; each of the 4"):
        dataclasses.replace(WIDE, arms=few, factors=("family", "width"))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"about": "a sentence"}, True),
        ({"labels": {"width": 3}}, True),
        ({"evaluation": dataclasses.replace(STUDY.arms["gpt"].evaluation, examples=7)}, True),
        ({"train": dataclasses.replace(STUDY.arms["gpt"].train, validate_every=7)}, True),
        ({"train": dataclasses.replace(STUDY.arms["gpt"].train, accumulation=2)}, True),
        ({"train": dataclasses.replace(STUDY.arms["gpt"].train, seed=7)}, False),
        ({"learning_rate": 1e-3}, False),
        ({"data": dataclasses.replace(STUDY.arms["gpt"].data, seed=1)}, False),
        ({"after": After(arm="gpt", identity="0")}, False),
    ],
)
def test_identity_is_what_decides_the_trained_model(change, same):
    run = STUDY.arms["gpt"]
    assert (identity(dataclasses.replace(run, **change)) == identity(run)) is same
