"""The runs of a study: its arms with each seed and trial, as far as the results so far decide them."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

from common.report.run_list import Choice, Trial
from experiments.run import Run, identity, made_from
from experiments.search import RATE, Search, with_trial
from experiments.study import Study

Key = tuple[str, Trial, int]
"""Arm, trial and seed. Without a search, an arm has one trial: its own learning rate."""
Losses = Mapping[Key, float]
"""Final validation losses of the runs that are done; infinite for one that diverged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a study."""

    name: str
    """Its directory within the study's."""
    arm: str
    trial: Trial
    seed: int
    run: Run
    """Complete: hyperparameters, labels, seeds and the run that it starts from are set."""

    @functools.cached_property
    def identity(self) -> str:
        return identity(self.run)

    @functools.cached_property
    def made_from(self) -> str:
        return made_from(self.run)

    @property
    def key(self) -> Key:
        return self.arm, self.trial, self.seed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Members:
    """The runs that follow from the results so far."""

    members: tuple[Member, ...]
    """In order of dependence."""
    chosen: Mapping[str, Choice]
    """By arm, where all trials are done; empty without a search."""
    complete: bool
    """Whether no run will be added to these."""

    def of_comparison(self) -> tuple[Member, ...]:
        """Returns the runs that arms are compared by: all while no trial is chosen, else those of the chosen ones."""
        chosen = {(arm, choice.trial) for arm, choice in self.chosen.items()}
        return tuple(member for member in self.members if not chosen or (member.arm, member.trial) in chosen)


def members_of(study: Study, losses: Losses) -> Members:
    """Returns the runs that are known so far: all of them without a search.

    With a search, first the trials; once those of all arms of a stage are done, further rates if a best one lies at the
    edge of a grid, then the remaining seeds with the best trial, then the arms that start from these.
    """
    study, found, chosen = study.equal_steps(), _Found(study), dict[str, Choice]()
    for stage in _stages(study):
        if study.search is None:
            for arm in stage:
                found.add(arm, Trial(rate=study.arms[arm].learning_rate), range(study.seeds))
            continue
        seeds = range(min(study.search.seeds, study.seeds))
        rates = _rates(study.search, stage, seeds, losses)
        for trial in study.search.trials(rates):
            for arm in stage:
                found.add(arm, trial, seeds)
        decided = {arm: _choose(study.search, arm, rates, seeds, losses) for arm in stage}
        if not all(decided.values()) or _extended(study.search, rates, decided) is not None:
            return Members(members=found.members, chosen=chosen, complete=False)
        for arm, choice in decided.items():
            assert choice is not None
            chosen[arm] = choice
            found.best[arm] = choice.trial
            found.add(arm, choice.trial, range(len(seeds), study.seeds))
    return Members(members=found.members, chosen=chosen, complete=True)


def most_runs(study: Study) -> int:
    """Returns the number of runs if every search is extended as far as it may be."""
    search = study.search
    if search is None:
        return len(study.arms) * study.seeds
    trial_seeds, trials = min(search.seeds, study.seeds), len(search.trials(search.rates))
    if search.draws is None:
        trials += trials // len(search.rates) * 2 * search.extend
    return len(study.arms) * (trials * trial_seeds + study.seeds - trial_seeds)


class _Found:
    """Collects members; knows the best trial of each arm, for the arms that start from it."""

    def __init__(self, study: Study):
        self.best = {name: Trial(rate=arm.learning_rate) for name, arm in study.arms.items()}
        self._study = study
        self._by_key: dict[Key, Member] = {}

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._by_key.values())

    def add(self, arm: str, trial: Trial, seeds: Sequence[int]) -> None:
        tried, search = with_trial(self._study.arms[arm], trial), self._study.search
        for seed in seeds:
            run = _seeded(tried, arm, seed)
            if run.after is not None:
                before = self._by_key[run.after.arm, self.best[run.after.arm], seed]
                after = dataclasses.replace(run.after, run=before.name, identity=before.identity)
                run = dataclasses.replace(run, after=after)
            name = arm + (search.suffix(trial) if search else "") + (f"-s{seed}" if seed else "")
            member = Member(name=name, arm=arm, trial=trial, seed=seed, run=run)
            self._by_key[member.key] = member


def _seeded(tried: Run, arm: str, seed: int) -> Run:
    return dataclasses.replace(
        tried,
        train=dataclasses.replace(tried.train, seed=tried.train.seed + seed),
        data=dataclasses.replace(tried.data, seed=tried.data.seed + seed),
        labels={"arm": arm, **tried.labels, "seed": seed, RATE: tried.learning_rate},
    )


def _stages(study: Study) -> Iterator[list[str]]:
    """Yields the arms that start fresh or from disk, then those that start from these, and so on."""
    depths: dict[str, int] = {}
    for name in study.in_order():
        after = study.arms[name].after
        depths[name] = 0 if after is None else depths[after.arm] + 1
    for depth in range(max(depths.values()) + 1):
        yield [name for name in study.arms if depths[name] == depth]


def _rates(search: Search, arms: Sequence[str], seeds: Sequence[int], losses: Losses) -> tuple[float, ...]:
    """Returns the rates to try, extended as far as the results so far call for it."""
    rates = search.rates
    while True:
        decided = {arm: _choose(search, arm, rates, seeds, losses) for arm in arms}
        if not all(decided.values()) or (longer := _extended(search, rates, decided)) is None:
            return rates
        rates = longer


def _choose(search: Search, arm: str, rates: Sequence[float], seeds: Sequence[int], losses: Losses) -> Choice | None:
    """Returns the trial with the lowest mean loss over seeds; None while a trial is not done.

    Of equal ones, the first. An arm that diverged in every trial counts as best at the lowest rate.
    """
    trials = search.trials(rates)
    if any((arm, trial, seed) not in losses for trial in trials for seed in seeds):
        return None
    means = [math.fsum(losses[arm, trial, seed] for seed in seeds) / len(seeds) for trial in trials]
    best = trials[means.index(min(means))]
    edges = search.edges(best, rates) if min(means) < math.inf else (RATE,)
    return Choice(rate=best.rate, also=dict(best.also), at_edge=bool(edges), edges=edges, trials=len(trials))


def _extended(
    search: Search, rates: tuple[float, ...], decided: Mapping[str, Choice | None]
) -> tuple[float, ...] | None:
    """Returns the rates with one more at an edge where a best one lies; None if there is none, or no more may be."""
    if search.draws is not None:
        return None
    best = {choice.rate for choice in decided.values() if choice is not None}
    ratio = (search.rates[-1] / search.rates[0]) ** (1 / (len(search.rates) - 1))
    lower, higher = rates.index(search.rates[0]), len(rates) - 1 - rates.index(search.rates[-1])
    if rates[0] in best and lower < search.extend:
        return (float(f"{rates[0] / ratio:.3g}"), *rates)
    if rates[-1] in best and higher < search.extend:
        return (*rates, float(f"{rates[-1] * ratio:.3g}"))
    return None
