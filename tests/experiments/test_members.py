import dataclasses
import itertools
import math

import numpy as np
import pytest

from common.config import from_json, to_json
from common.errors import UserError
from common.report.run_list import Trial
from experiments.first_light import first_light
from experiments.members import Key, Members, members_of, most_runs
from experiments.run import After, identity
from experiments.search import LogRange, Search, Values
from experiments.structure import structure
from experiments.study import Study

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


def key(arm: str, rate: float, seed: int = 0) -> Key:
    return arm, Trial(rate=rate), seed


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
        known |= {key("gpt", 2e-3): 1.0, key("gpt", 2e-3, 1): 4.0, key("gpt", 4e-3): 2.0, key("gpt", 4e-3, 1): 2.0}
        known |= {key("t5like", 2e-3, seed): 1.0 for seed in (0, 1)}
        wide = dataclasses.replace(TUNED, search=dataclasses.replace(SEARCH, extend=0))
        assert members_of(wide, known).chosen["gpt"].rate == 4e-3

    def test_a_rate_that_diverged_with_one_seed_is_not_chosen(self):
        known = losses(TUNED, {"t5like": 2e-3, "gpt": 2e-3}) | {key("gpt", 2e-3, 1): math.inf}
        wide = dataclasses.replace(TUNED, search=dataclasses.replace(SEARCH, extend=0))
        assert members_of(wide, known).chosen["gpt"].rate != 2e-3

    def test_the_largest_number_of_runs_is_what_a_search_extended_both_ways_takes(self):
        assert most_runs(TUNED) == 2 * ((3 + 2) * 2 + 2)
        assert most_runs(dataclasses.replace(ONE_RATE, seeds=5)) == 10

    @pytest.mark.parametrize("rates", [(1e-3,), (2e-3, 1e-3), (1e-3, 2e-3, 9e-3)])
    def test_rates_ascend_at_equal_ratios(self, rates):
        with pytest.raises(UserError, match=r"search\.rates is"):
            Search(rates=rates)

    def test_a_search_of_rates_keeps_the_names_and_identities_of_its_runs(self):
        """Directories of runs that are trained already depend on both."""
        found = {member.name: member.identity for member in members_of(structure(), {}).members}
        assert found["complete-lr0.001"] == "b71f6f60026b1643" and found["causal-lr0.001"] == "347c547128ed2522"
        known = losses(TUNED, {"t5like": 2e-3, "gpt": 4e-3})
        assert {name for name in names(TUNED, known) if name.startswith("gpt")} == {
            f"gpt-lr{rate}{seed}" for rate in ("0.001", "0.002", "0.004", "0.008") for seed in ("", "-s1")
        }


DECAY, WARMUP = "train.optimizer.weight_decay", "train.schedule.warmup_steps"
GRID = Search(
    rates=(1e-3, 2e-3, 4e-3),
    also=(LogRange(path=DECAY, low=0.01, high=1.0), Values(path=WARMUP, values=(0, 10, 20))),
    extend=1,
)
BEST = Trial(rate=2e-3, also=((DECAY, 0.1), (WARMUP, 10)))


def answered(search: Search, best: dict[str, Trial], seeds: int = 1) -> Members:
    """Answers for every run until no other follows: an arm's loss grows with the distance from its best trial."""
    study, known = dataclasses.replace(ONE_RATE, search=search, seeds=seeds), {}

    def loss(arm: str, trial: Trial) -> float:
        here, there = ((trial.rate, *dict(trial.also).values()) for trial in (trial, best[arm]))
        return sum(math.log((a + 1e-4) / (b + 1e-4)) ** 2 for a, b in zip(here, there, strict=True))

    while not (members := members_of(study, known)).complete:
        known |= {member.key: loss(member.arm, member.trial) for member in members.members}
    return members


class TestSeveralHyperparameters:
    def test_a_grid_tries_every_combination_for_every_arm(self):
        members = members_of(dataclasses.replace(ONE_RATE, search=GRID), {}).members
        for arm in ONE_RATE.arms:
            runs = [m.run for m in members if m.arm == arm]
            tried = [(r.learning_rate, r.train.optimizer.weight_decay, r.train.schedule.warmup_steps) for r in runs]
            assert tried == list(itertools.product(GRID.rates, (0.01, 0.1, 1.0), (0, 10, 20)))
        assert members[0].name == "t5like-lr0.001-weight_decay0.01-warmup_steps0"
        assert len({member.identity for member in members}) == len({member.name for member in members}) == 2 * 27

    def test_the_best_trial_trains_with_further_seeds(self):
        members = answered(
            GRID, {"t5like": BEST, "gpt": dataclasses.replace(BEST, also=((DECAY, 1.0), (WARMUP, 0)))}, 3
        )
        chosen = members.chosen
        assert chosen["t5like"].trial == BEST and not chosen["t5like"].at_edge and chosen["t5like"].trials == 27
        assert chosen["gpt"].edges == ("weight_decay",), "nothing lies below a warm-up of 0"
        assert [m.name for m in members.members if m.seed == 2] == [
            "t5like-lr0.002-weight_decay0.1-warmup_steps10-s2",
            "gpt-lr0.002-weight_decay1-warmup_steps0-s2",
        ]
        assert len(members.of_comparison()) == 2 * 3

    def test_a_grid_is_extended_in_its_rates_only(self):
        high = dataclasses.replace(BEST, rate=1.0)
        members = answered(GRID, {"t5like": BEST, "gpt": high})
        assert len(members.members) == 2 * 4 * 9 == most_runs(dataclasses.replace(ONE_RATE, search=GRID)) - 2 * 9
        assert members.chosen["gpt"].edges == ("learning_rate",) and members.chosen["gpt"].rate == 8e-3

    def test_draws_are_the_same_for_every_arm_and_for_more_draws_and_hyperparameters(self):
        few, many = (dataclasses.replace(GRID, draws=n).trials(GRID.rates) for n in (8, 24))
        rates = dataclasses.replace(GRID, draws=24, also=()).trials(GRID.rates)
        assert many[:8] == few and [trial.rate for trial in many] == [trial.rate for trial in rates]
        members = answered(dataclasses.replace(GRID, draws=8), {"t5like": BEST, "gpt": BEST}).members
        assert len(members) == 16 == most_runs(dataclasses.replace(ONE_RATE, search=dataclasses.replace(GRID, draws=8)))
        assert [m.trial for m in members if m.arm == "gpt"] == [m.trial for m in members if m.arm == "t5like"] == [*few]
        assert dataclasses.replace(GRID, draws=8, draw_seed=1).trials(GRID.rates) != few

    def test_draws_are_uniform_in_the_logarithm(self):
        trials = dataclasses.replace(GRID, draws=2000, also=GRID.also[:1]).trials(GRID.rates)
        for low, high, drawn in (
            (1e-3, 4e-3, [trial.rate for trial in trials]),
            (0.01, 1.0, [dict(trial.also)[DECAY] for trial in trials]),
        ):
            place = np.log(np.array(drawn) / low) / math.log(high / low)
            counts, _ = np.histogram(place, bins=10, range=(-0.01, 1.01))
            assert counts.sum() == 2000 and (abs(counts - 200) < 5 * math.sqrt(200)).all()
        assert len(set(trials)) == 2000

    @pytest.mark.parametrize(
        ("trial", "edges"),
        [
            (Trial(rate=2e-3, also=((DECAY, 0.1), (WARMUP, 0))), ()),
            (Trial(rate=1.2e-3, also=((DECAY, 0.017), (WARMUP, 10))), ()),
            (Trial(rate=1.1e-3, also=((DECAY, 0.1), (WARMUP, 20))), ("learning_rate", "warmup_steps")),
            (Trial(rate=3.6e-3, also=((DECAY, 0.65), (WARMUP, 10))), ("learning_rate", "weight_decay")),
        ],
    )
    def test_the_outer_tenth_of_a_range_is_the_edge_of_random_draws(self, trial, edges):
        assert dataclasses.replace(GRID, draws=8).edges(trial, GRID.rates) == edges

    def test_an_arm_that_diverged_in_every_draw_is_not_tuned(self):
        study = dataclasses.replace(ONE_RATE, search=dataclasses.replace(GRID, draws=4))
        known = dict.fromkeys((member.key for member in members_of(study, {}).members), math.inf)
        assert members_of(study, known).chosen["gpt"].at_edge

    @pytest.mark.parametrize(
        ("one", "message"),
        [
            (Values(path="train.optimizer.weight_dekay", values=(0, 1)), "did you mean 'weight_decay'"),
            (Values(path=WARMUP, values=(0.5, 1.0, 2.0)), "warmup_steps: expected int, got 0.5"),
            (LogRange(path="train.optimizer.b1", low=0.5, high=2.0), "b1 is 1.0: it must be less than 1"),
            (Values(path="train.seed", values=(0, 1)), "it may name numbers of train and model"),
            (Values(path="train.validate_every", values=(0, 1)), "it may name numbers of train and model"),
            (Values(path="data.rows", values=(1, 2, 3)), "it may name numbers of train and model"),
            (LogRange(path="model.d_ff", low=64, high=256), "changes the FLOPs of arm 't5like'"),
        ],
    )
    def test_what_no_arm_can_be_tuned_by_is_refused(self, one, message):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(ONE_RATE, search=Search(rates=(1e-3, 2e-3), also=(one,)))

    def test_a_range_too_narrow_for_its_draws_or_always_at_its_edge_is_refused(self):
        with pytest.raises(UserError, match="the ranges hold about 6 different trials"):
            Search(rates=(1e-3, 1.05e-3), draws=64)
        with pytest.raises(UserError, match="always lie at the edge"):
            Values(path=DECAY, values=(0.01, 0.1))
        with pytest.raises(UserError, match="has 2 values on a grid"):
            LogRange(path=DECAY, low=1, high=2)
        with pytest.raises(UserError, match=f"has '{DECAY}' twice"):
            Search(rates=(1e-3, 2e-3), also=(GRID.also[0],) * 2)


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
