import dataclasses
import math

import pytest

from common.config import from_json, to_json
from common.errors import UserError
from experiments.first_light import first_light
from experiments.members import members_of, most_runs
from experiments.run import After, identity
from experiments.study import Search, Study

ONE_RATE = first_light()
SEARCH = Search(rates=(1e-3, 2e-3, 4e-3), seeds=2, extend=1)
TUNED = dataclasses.replace(ONE_RATE, seeds=4, search=SEARCH)


def losses(study: Study, best: dict[str, float], known=None) -> dict:
    """Answers for every run that the results so far call for: the loss is least at the arm's best rate."""
    known = {} if known is None else dict(known)
    for member in members_of(study, known).members:
        distance = abs(math.log(member.run.learning_rate / best[member.arm]))
        known.setdefault(member.key, 1 + distance + 0.01 * member.seed)
    return known


def names(study: Study, known) -> list[str]:
    return [member.name for member in members_of(study, known).members]


class TestWithoutSearch:
    def test_every_arm_trains_with_every_seed_at_its_own_rate(self):
        members = members_of(dataclasses.replace(ONE_RATE, seeds=2), {})
        assert [member.name for member in members.members] == ["t5like", "t5like-s1", "gpt", "gpt-s1"]
        assert members.complete and members.chosen == {} and members.of_comparison() == members.members

    def test_a_seed_changes_initialisation_and_data_order_of_all_arms_alike(self):
        second = members_of(dataclasses.replace(ONE_RATE, seeds=2), {}).members[1].run
        arm = ONE_RATE.arms["t5like"]
        assert (second.train.seed, second.data.seed) == (arm.train.seed + 1, arm.data.seed + 1)
        assert second.labels == {"arm": "t5like", "family": "t5like", "seed": 1, "learning_rate": 2e-3}

    def test_more_seeds_leave_the_runs_of_the_first_as_they_were(self):
        few, many = (members_of(dataclasses.replace(ONE_RATE, seeds=n), {}).members for n in (2, 5))
        of_many = {member.name: member.identity for member in many}
        assert all(of_many[member.name] == member.identity for member in few)

    def test_a_run_comes_back_from_json_with_its_identity(self):
        run = members_of(ONE_RATE, {}).members[0].run
        assert identity(from_json(type(run), to_json(run))) == identity(run)


class TestSearch:
    def test_trials_come_first(self):
        members = members_of(TUNED, {})
        assert len(members.members) == 2 * 3 * 2 and not members.complete and not members.chosen
        assert names(TUNED, {})[:3] == ["t5like-lr0.001", "t5like-lr0.001-s1", "gpt-lr0.001"]

    def test_further_seeds_train_at_the_chosen_rate_only(self):
        known = losses(TUNED, {"t5like": 2e-3, "gpt": 2e-3})
        members = members_of(TUNED, known)
        assert members.complete and {arm: choice.rate for arm, choice in members.chosen.items()} == {
            "t5like": 2e-3,
            "gpt": 2e-3,
        }
        assert [name for name in names(TUNED, known) if name.endswith("-s3")] == ["t5like-lr0.002-s3", "gpt-lr0.002-s3"]
        assert {member.run.learning_rate for member in members.of_comparison()} == {2e-3}
        assert len(members.of_comparison()) == 2 * 4

    def test_one_arm_at_the_edge_extends_the_rates_of_all(self):
        known = losses(TUNED, {"t5like": 2e-3, "gpt": 4e-3})
        extended = members_of(TUNED, known)
        assert {"t5like-lr0.008", "gpt-lr0.008-s1"} <= set(names(TUNED, known)) and not extended.complete
        known = losses(TUNED, {"t5like": 2e-3, "gpt": 4e-3}, known)
        done = members_of(TUNED, known)
        assert {choice.trials for choice in done.chosen.values()} == {4}
        assert done.chosen["gpt"].rate == 4e-3 and not done.chosen["gpt"].at_edge

    def test_an_optimum_beyond_the_last_extension_counts_as_at_the_edge(self):
        best = {"t5like": 2e-3, "gpt": 1.0}
        known = losses(TUNED, best, losses(TUNED, best))
        chosen = members_of(TUNED, known).chosen
        assert chosen["gpt"].rate == 8e-3 and chosen["gpt"].at_edge and not chosen["t5like"].at_edge

    def test_the_mean_over_the_seeds_of_the_trials_decides(self):
        known = dict.fromkeys((member.key for member in members_of(TUNED, {}).members), 3.0)
        known |= {("gpt", 2e-3, 0): 1.0, ("gpt", 2e-3, 1): 4.0, ("gpt", 4e-3, 0): 2.0, ("gpt", 4e-3, 1): 2.0}
        known |= {("t5like", 2e-3, seed): 1.0 for seed in (0, 1)}
        wide = dataclasses.replace(TUNED, search=dataclasses.replace(SEARCH, extend=0))
        assert members_of(wide, known).chosen["gpt"].rate == 4e-3

    def test_a_rate_that_diverged_with_one_seed_is_not_chosen(self):
        known = losses(TUNED, {"t5like": 2e-3, "gpt": 2e-3}) | {("gpt", 2e-3, 1): math.inf}
        wide = dataclasses.replace(TUNED, search=dataclasses.replace(SEARCH, extend=0))
        assert members_of(wide, known).chosen["gpt"].rate != 2e-3

    def test_the_largest_number_of_runs_is_what_a_search_extended_both_ways_takes(self):
        assert most_runs(TUNED) == 2 * ((3 + 2) * 2 + 2)
        assert most_runs(dataclasses.replace(ONE_RATE, seeds=5)) == 10

    @pytest.mark.parametrize("rates", [(1e-3,), (2e-3, 1e-3), (1e-3, 2e-3, 9e-3)])
    def test_rates_ascend_at_equal_ratios(self, rates):
        with pytest.raises(UserError, match=r"search\.rates is"):
            Search(rates=rates)


class TestStages:
    def staged(self, **change) -> Study:
        first = ONE_RATE.arms["gpt"]
        tuned = dataclasses.replace(first, after=After(arm="gpt"), labels={"family": "gpt", "stage": "second"})
        return dataclasses.replace(ONE_RATE, arms={"tuned": tuned, "gpt": first}, parity=(), **change)

    def test_a_run_comes_after_the_run_of_the_same_seed(self):
        members = {member.name: member for member in members_of(self.staged(seeds=2), {}).members}
        assert list(members) == ["gpt", "gpt-s1", "tuned", "tuned-s1"]
        after = members["tuned-s1"].run.after
        assert (after.run, after.identity) == ("gpt-s1", members["gpt-s1"].identity)

    def test_what_a_run_starts_from_is_part_of_its_identity(self):
        one = members_of(self.staged(), {}).members[-1]
        other_first = self.staged().edited(lambda run: dataclasses.replace(run, learning_rate=1e-3), arms=["gpt"])
        assert members_of(other_first, {}).members[-1].identity != one.identity

    def test_a_later_stage_waits_for_the_search_of_the_first(self):
        study = self.staged(search=dataclasses.replace(SEARCH, seeds=1))
        assert {member.arm for member in members_of(study, {}).members} == {"gpt"}
        known = losses(study, {"gpt": 2e-3, "tuned": 2e-3})
        later = [member for member in members_of(study, known).members if member.arm == "tuned"]
        assert {member.run.after.run for member in later} == {"gpt-lr0.002"}

    def test_arms_that_start_from_each_other_are_refused(self):
        arm = ONE_RATE.arms["gpt"]
        circle = {name: dataclasses.replace(arm, after=After(arm=other)) for name, other in (("a", "b"), ("b", "a"))}
        with pytest.raises(UserError, match="in a circle: a, b"):
            dataclasses.replace(ONE_RATE, arms=circle)
