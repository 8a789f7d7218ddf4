"""The runs of a study: its arms with each seed and learning rate, as far as the results so far decide them."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

from common.report.run_files import Choice
from experiments.run import LearningRate, Run, identity, made_from
from experiments.study import Search, Study

Losses = Mapping[tuple[str, float, int], float]
"""Final validation loss by arm, learning rate and seed, of the runs that are done; infinite for one that diverged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a study."""

    name: str
    """Its directory within the study's."""
    arm: str
    seed: int
    run: Run
    """Complete: labels, seeds and the run that it starts from are set."""

    @functools.cached_property
    def identity(self) -> str:
        return identity(self.run)

    @functools.cached_property
    def made_from(self) -> str:
        return made_from(self.run)

    @property
    def key(self) -> tuple[str, float, int]:
        """Its key in `Losses`."""
        return self.arm, self.run.learning_rate, self.seed


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
        """Returns the runs that arms are compared by: all while no rate is chosen, else those at the chosen rates."""
        return tuple(
            member
            for member in self.members
            if not self.chosen
            or (member.arm in self.chosen and self.chosen[member.arm].rate == member.run.learning_rate)
        )


def members_of(study: Study, losses: Losses) -> Members:
    """Returns the runs that are known so far: all of them without a search.

    With a search, first the trials; once those of all arms of a stage are done, further rates if a best one lies at the
    edge, then the remaining seeds at the best rate, then the arms that start from these.
    """
    study, found, chosen = study.equal_steps(), _Found(study), dict[str, Choice]()
    for stage in _stages(study):
        if study.search is None:
            for arm in stage:
                found.add(arm, study.arms[arm].learning_rate, range(study.seeds))
            continue
        seeds = range(min(study.search.seeds, study.seeds))
        rates = _rates(study.search, stage, seeds, losses)
        for rate in rates:
            for arm in stage:
                found.add(arm, rate, seeds)
        decided = {arm: _choose(arm, rates, seeds, losses) for arm in stage}
        if not all(decided.values()) or _extended(study.search, rates, decided) is not None:
            return Members(members=found.members, chosen=chosen, complete=False)
        for arm, choice in decided.items():
            assert choice is not None
            chosen[arm] = choice
            found.rates[arm] = choice.rate
            found.add(arm, choice.rate, range(len(seeds), study.seeds))
    return Members(members=found.members, chosen=chosen, complete=True)


def most_runs(study: Study) -> int:
    """Returns the number of runs if every search is extended as far as it may be."""
    search = study.search
    if search is None:
        return len(study.arms) * study.seeds
    trial_seeds = min(search.seeds, study.seeds)
    return len(study.arms) * ((len(search.rates) + 2 * search.extend) * trial_seeds + study.seeds - trial_seeds)


class _Found:
    """Collects members; knows the rate of each arm, for the arms that start from it."""

    def __init__(self, study: Study):
        self.rates = {name: arm.learning_rate for name, arm in study.arms.items()}
        self._study = study
        self._by_key: dict[tuple[str, float, int], Member] = {}

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._by_key.values())

    def add(self, arm: str, rate: float, seeds: Sequence[int]) -> None:
        for seed in seeds:
            run = _seeded(self._study.arms[arm], arm, rate, seed)
            if run.after is not None:
                before = self._by_key[run.after.arm, self.rates[run.after.arm], seed]
                after = dataclasses.replace(run.after, run=before.name, identity=before.identity)
                run = dataclasses.replace(run, after=after)
            name = arm + (f"-lr{rate:g}" if self._study.search else "") + (f"-s{seed}" if seed else "")
            member = Member(name=name, arm=arm, seed=seed, run=run)
            self._by_key[member.key] = member


def _seeded(arm: Run, name: str, rate: LearningRate, seed: int) -> Run:
    return dataclasses.replace(
        arm,
        learning_rate=rate,
        train=dataclasses.replace(arm.train, seed=arm.train.seed + seed),
        data=dataclasses.replace(arm.data, seed=arm.data.seed + seed),
        labels={"arm": name, **arm.labels, "seed": seed, "learning_rate": rate},
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
        decided = {arm: _choose(arm, rates, seeds, losses) for arm in arms}
        if not all(decided.values()) or (longer := _extended(search, rates, decided)) is None:
            return rates
        rates = longer


def _choose(arm: str, rates: Sequence[float], seeds: Sequence[int], losses: Losses) -> Choice | None:
    """Returns the rate with the lowest mean loss over seeds; None while a trial is not done.

    Of equal ones, the lowest. An arm that diverged at every rate counts as best at the lowest.
    """
    if any((arm, rate, seed) not in losses for rate in rates for seed in seeds):
        return None
    means = [math.fsum(losses[arm, rate, seed] for seed in seeds) / len(seeds) for rate in rates]
    best = means.index(min(means))
    return Choice(rate=rates[best], at_edge=best in (0, len(rates) - 1), trials=len(rates))


def _extended(
    search: Search, rates: tuple[float, ...], decided: Mapping[str, Choice | None]
) -> tuple[float, ...] | None:
    """Returns the rates with one more at an edge where a best one lies; None if there is none, or no more may be."""
    best = {choice.rate for choice in decided.values() if choice is not None}
    ratio = (search.rates[-1] / search.rates[0]) ** (1 / (len(search.rates) - 1))
    lower, higher = rates.index(search.rates[0]), len(rates) - 1 - rates.index(search.rates[-1])
    if rates[0] in best and lower < search.extend:
        return (float(f"{rates[0] / ratio:.3g}"), *rates)
    if rates[-1] in best and higher < search.extend:
        return (*rates, float(f"{rates[-1] * ratio:.3g}"))
    return None
