"""A certificate checks exactly what a study claims, group by group, and names what it does not claim."""

import dataclasses
from typing import Any

import pytest

from common.report.certificate import certify, differences
from common.report.claims import Parity
from common.report.parity import check_group, groups
from common.report.run_files import FinishedRun
from common.report.run_list import Choice
from tests.common.report.studies import finished, study_of

CHAIN = ("a", "b", "c", "d")
OTHER = ("a", "b", "x", "y")


def answers(*runs: FinishedRun, claim: Parity) -> dict[str, bool | None]:
    group = {run.name: run for run in runs}
    return {check.name: check.agrees for check in check_group(group, claim)}


def test_groups_are_equal_in_every_label_but_those_that_the_claim_is_over() -> None:
    runs = [
        finished(f"{family}-{width}", seed=seed, rate=rate, labels={"family": family, "width": width})
        for width in (64, 128)
        for family, rate in (("gpt", 1e-3), ("t5like", 2e-3))
        for seed in (0, 1)
    ]
    trial = finished("gpt-64", rate=9.0, labels={"family": "gpt", "width": 64}, compared=False)
    study = study_of(*runs, trial)
    found = groups(study, Parity(over=("family",)))
    assert {key: [run.arm for run in group.values()] for key, group in found.items()} == {
        f"width {width}, seed {seed}": [f"gpt-{width}", f"t5like-{width}"] for width in (64, 128) for seed in (0, 1)
    }
    assert {key: len(group) for key, group in groups(study, Parity()).items()} == {"seed 0": 4, "seed 1": 4}
    assert groups(study, Parity(over=("family", "width"))).keys() == {"seed 0", "seed 1"}


def test_a_lone_run_of_a_group_is_in_none() -> None:
    lone = finished("c", labels={"width": 3})
    study = study_of(finished("a", labels={"width": 1}), finished("b", labels={"width": 2}), lone)
    claim = Parity(over=("family",))
    assert groups(study, claim) == {}
    assert certify(dataclasses.replace(study, parity=(claim,))).headline == "no runs of one group: nothing to compare"


@pytest.mark.parametrize(
    ("first", "second", "data", "agrees"),
    [
        (CHAIN, CHAIN, "batches", True),
        (CHAIN, OTHER, "batches", False),
        (CHAIN, CHAIN[:3], "batches", False),
        (CHAIN, CHAIN[:3], "prefix", True),
        (CHAIN[:2], OTHER, "prefix", True),
        (CHAIN[:3], OTHER, "prefix", False),
        (CHAIN, CHAIN, "prefix", True),
        (CHAIN, OTHER, "any", None),
    ],
)
def test_data_are_compared_as_claimed(first: tuple[str, ...], second: tuple[str, ...], data: Any, agrees: bool) -> None:
    claim = Parity(data=data, steps=False, flops_within=None)
    for pair in ((first, second), (second, first)):
        found = answers(*(finished(name, chain=chain) for name, chain in zip("ab", pair, strict=True)), claim=claim)
        assert list(found.values()) == ([True] if agrees is None else [agrees, True]), found


def test_source_examples_are_compared_where_they_are_recorded() -> None:
    """Batches of another objective differ; their source examples need not."""
    claim = Parity(data="source")
    first, same = finished("a", chain=CHAIN, source=CHAIN), finished("b", chain=OTHER, source=CHAIN)
    name = "same source examples in the same order"
    assert answers(first, same, claim=claim)[name] is True
    assert answers(first, finished("c", chain=CHAIN, source=OTHER), claim=claim)[name] is False
    unknown = finished("d", chain=CHAIN)
    assert answers(first, unknown, claim=claim)[name] is None
    certificate = certify(study_of(first, unknown, parity=[claim]))
    assert certificate.agrees is None and "could not be checked: d" in certificate.checks[0].detail
    shorter = finished("e", chain=CHAIN[:2], source=CHAIN[:2])
    assert answers(first, shorter, claim=claim)[name] is False
    assert answers(first, shorter, claim=dataclasses.replace(claim, steps=False))[name] is True


def test_what_is_not_claimed_is_named_and_does_not_fail() -> None:
    flops = dataclasses.replace(finished("a").result.flops, full_attention=8.2e14)
    configs = [{"data": {"seed": 0}, "train": {"budget": {"amount": amount}}} for amount in (120, 240)]
    runs = [
        finished("a", labels={"size": 1}, config=configs[0]),
        finished("b", labels={"size": 2}, config=configs[1], steps=240, fingerprint="1", flops=flops),
    ]
    strict = certify(study_of(*runs, parity=[Parity(over=("size",))]))
    assert strict.headline == "4 of 5 checks DIFFER" and not strict.unclaimed
    loose = Parity(over=("size",), data="any", steps=False, flops_within=None)
    certificate = certify(study_of(*runs, parity=[loose]))
    assert certificate.agrees
    assert certificate.unclaimed == (
        "Not claimed to be equal between arms that differ in size: "
        "the data; steps (120 to 240); training FLOPs (4.10e14 to 8.20e14).",
    )
    assert "train.budget.amount (120 / 240)" in certificate.checks[0].detail


@pytest.mark.parametrize(
    ("apart", "agrees"), [(("model.memory",), True), (("model.*",), True), (("model",), True), (("mod",), False)]
)
def test_fields_taken_apart_are_patterns(apart: tuple[str, ...], agrees: bool) -> None:
    runs = [finished(name, config={"model": {"kind": "x", "memory": name}}) for name in "ab"]
    assert answers(*runs, claim=Parity(apart=apart))["one recipe"] is agrees


def test_arms_of_a_joint_plan_may_name_each_other() -> None:
    """Each names how the others read the source, so their configs differ in it; the fingerprints prove the rest."""
    runs = [
        finished(name, chain=CHAIN, source=CHAIN, config={"data": {"joint": [{"objective": {"kind": other}}]}})
        for name, other in ("ab", "ba")
    ]
    assert answers(*runs, claim=Parity(data="source"))["one recipe"] is True
    assert answers(*runs, claim=Parity())["one recipe"] is False


def test_labels_are_not_part_of_the_recipe() -> None:
    runs = [finished(name, config={"labels": {"arm": name, "width": ord(name)}, "seed": 0}) for name in "ab"]
    recipe = next(check for check in certify(study_of(*runs)).checks if check.name == "one recipe")
    assert recipe.agrees and "labels" not in recipe.detail


def test_eighty_runs_give_one_line_for_each_question() -> None:
    runs = [
        finished(f"arm{arm}", seed=seed, fingerprint="1" if seed in (3, 4) and arm == 7 else "0")
        for arm in range(16)
        for seed in range(5)
    ]
    certificate = certify(study_of(*runs))
    assert len(certificate.checks) == 5 and certificate.headline == "1 of 5 checks DIFFER"
    data, steps, *_, ledger = certificate.checks
    assert data.detail == "2 of 5 groups DIFFER: seed 3: the chained fingerprints differ | " + (
        "seed 4: the chained fingerprints differ"
    )
    assert steps.detail.startswith("in each of 5 groups of runs; seed 0: 120 steps, ")
    assert all(len(check.detail) < 400 for check in certificate.checks) and ledger.detail.endswith("and 72 more")


def test_each_claim_has_its_own_checks() -> None:
    runs = [finished(f"{f}{w}", labels={"f": f, "w": w}, fingerprint=f"{w}") for f in "gt" for w in (1, 2)]
    parity = [Parity(over=("f",)), Parity(over=("w",), data="any")]
    certificate = certify(study_of(*runs, parity=parity))
    assert certificate.agrees
    assert [check.name for check in certificate.checks if "data" in check.name] == [
        "same data in the same order, between arms that differ in f"
    ]
    assert certificate.unclaimed == ("Not claimed to be equal between arms that differ in w: the data.",)
    assert not certify(study_of(*runs)).agrees


def test_two_runs_differ_in_the_checks_that_fail_between_them() -> None:
    first, second = finished("a"), finished("b", steps=100, xla_flops_per_step=1.0)
    assert differences(first, finished("c"), Parity()) == ()
    assert differences(first, second, Parity()) == (
        "“same steps, examples and tokens”",
        "“ledger = XLA within 2 %”",
    )


def test_trials_are_not_compared_even_before_a_rate_is_chosen() -> None:
    trials = [finished("a", rate=rate, validation_loss=loss) for rate, loss in ((1e-3, 2.0), (2e-3, 1.0), (4e-3, 3.0))]
    study = study_of(*trials, finished("b", rate=1e-3), rates=(1e-3, 2e-3, 4e-3))
    assert [(run.arm, run.rate) for run in study.compared] == [("a", 2e-3), ("b", 1e-3)]
    chosen = {"a": Choice(rate=4e-3, at_edge=True, trials=3)}
    study = study_of(*trials, rates=(1e-3, 2e-3, 4e-3), chosen=chosen)
    assert [run.rate for run in study.compared] == [4e-3] and list(study.by_title) == ["a"]
