"""A study's search: the same trials of hyperparameters for every arm.

A trial is a learning rate and a value of each further hyperparameter that the search names. The trials are a full grid,
or random draws.

>>> decay = LogRange(path="train.optimizer.weight_decay", low=0.01, high=1.0)
>>> search = Search(rates=(1e-3, 2e-3, 4e-3), also=(decay, Values(path="train.schedule.warmup_steps", values=(0, 50))))
>>> len(search.trials(search.rates)), decay.grid
(18, (0.01, 0.1, 1.0))
>>> trials = dataclasses.replace(search, draws=16).trials(search.rates)
>>> trials[0]
Trial(rate=0.00254, also=(('train.optimizer.weight_decay', 0.622), ('train.schedule.warmup_steps', 0)))
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from common.config import apply_overrides
from common.errors import UserError
from common.ranges import Count, Range, Seed, check_ranges
from common.report.run_list import Trial, short_names
from common.train.config import decides_result
from experiments.run import LearningRate, Run

RATE = "learning_rate"
AboveZero = Annotated[int | float, Range(0, 1e12, "(]")]
OUTER = 0.1
"""The share of a logarithmic range, at each end, in which the best of random draws counts as at the edge.

A best draw is near the optimum, not at it, so it is no matter of the outermost draw. Simulated with a quadratic loss in
two hyperparameters: where the optimum lies a tenth of the range beyond an end, the best of 16 draws is in the outer
tenth in 60 % of cases, that of 64 draws in 91 % (the outermost draw is the best one in 49 and 25 %); where it lies in
the middle, never. A hyperparameter that has no influence gives a false alarm in one of five: leave it out.
"""
MOST_ATTEMPTS = 1000
"""How often to draw for each distinct trial, before a search counts as too narrow for its number of draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Values:
    """Tries these values of a hyperparameter; a random draw takes one of them, each as likely as the others."""

    kind: Literal["values"] = "values"
    path: str
    """Dotted path of the number within a run, such as `train.schedule.warmup_steps`."""
    values: tuple[Annotated[int | float, Range(0, 1e12)], ...]
    """Ascending. The best one must not be the first or the last, unless the first is 0: nothing lies below that."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if any(low >= high for low, high in itertools.pairwise(self.values)):
            raise UserError(f"values of {self.path} are {list(self.values)}: give them in ascending order")
        if not set(self.values) - self.ends:
            raise UserError(
                f"values of {self.path} are {list(self.values)}: the best one would always lie at the edge; give at "
                "least three, or two of which the first is 0"
            )

    @property
    def grid(self) -> tuple[int | float, ...]:
        return self.values

    @property
    def ends(self) -> set[int | float]:
        return {*self.values[-1:], *(value for value in self.values[:1] if value != 0)}

    def draw(self, dice: random.Random) -> int | float:
        return self.values[int(dice.random() * len(self.values))]

    def is_at_edge(self, value: float, drawn: bool) -> bool:
        return value in self.ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogRange:
    """Tries values of a hyperparameter between two ends, at equal ratios, or drawn uniformly in the logarithm.

    Values have three significant digits; they are whole numbers if both ends are (10, not 10.0).
    """

    kind: Literal["log_range"] = "log_range"
    path: str
    """Dotted path of the number within a run, such as `train.optimizer.weight_decay`."""
    low: AboveZero
    high: AboveZero
    points: Annotated[int, Range(3, 100, unit="points")] = 3
    """How many values a grid has, both ends included."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.low >= self.high:
            raise UserError(f"the range of {self.path} is {self.low} to {self.high}: low must be less than high")
        if len(self.grid) < 3:
            raise UserError(
                f"the range of {self.path}, {self.low} to {self.high}, has {len(self.grid)} values on a grid: the best "
                "one would always lie at the edge"
            )

    @property
    def grid(self) -> tuple[int | float, ...]:
        return tuple(dict.fromkeys(self._at(i / (self.points - 1)) for i in range(self.points)))

    def draw(self, dice: random.Random) -> int | float:
        return self._at(dice.random())

    def is_at_edge(self, value: float, drawn: bool) -> bool:
        return _is_outer(value, self.low, self.high) if drawn else value in (self.grid[0], self.grid[-1])

    def _at(self, place: float) -> int | float:
        value = float(f"{self.low * (self.high / self.low) ** place:.3g}")
        return round(value) if isinstance(self.low, int) and isinstance(self.high, int) else value


Hyperparameter = Values | LogRange


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Tries the same hyperparameters for every arm and keeps those with the lowest mean validation loss over seeds.

    A grid whose best rate, of any arm, is the lowest or the highest one gets the next rate in that direction, for all
    arms. An arm counts as not tuned if its best trial still lies at the edge of any hyperparameter: at an end of a
    grid, or with random draws in the outer tenth of a range (`OUTER`).
    """

    rates: tuple[LearningRate, ...]
    """Learning rates, ascending, at equal ratios. Random draws use the first and the last one, and those between."""
    also: tuple[Hyperparameter, ...] = ()
    """Further hyperparameters; with a grid, every combination of their values and the rates is a trial. Each value of
    an optimizer's or a model's number takes a compilation for each arm, those of a schedule take none."""
    draws: Annotated[int, Range(2, 10_000, unit="trials")] | None = None
    """How many random draws to try instead of the grid: of rates between the ends, uniform in the logarithm, and of
    each hyperparameter. More draws begin with the same ones, and so does a search with another hyperparameter."""
    draw_seed: Seed = 0
    """Seed of the draws, which are the same for every arm."""
    seeds: Count = 1
    """Seeds of each trial. Further seeds of the study train with the best trial only."""
    extend: Annotated[int, Range(0, 16, unit="rates")] = 2
    """The most rates to add to a grid in each direction."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if len(self.rates) < 2 or any(low >= high for low, high in itertools.pairwise(self.rates)):
            raise UserError(f"search.rates is {list(self.rates)}: give at least two, in ascending order")
        ratios = [high / low for low, high in itertools.pairwise(self.rates)]
        if max(ratios) > 1.05 * min(ratios):
            raise UserError(
                f"search.rates is {list(self.rates)}: neighbours must have equal ratios, so that every optimum is "
                f"searched equally finely; nearest: {_equal_ratios(self.rates)}"
            )
        if twice := [path for path in self.paths if self.paths.count(path) > 1]:
            raise UserError(f"search.also has {twice[0]!r} twice")
        if self.draws is not None and len(found := self.trials(self.rates)) < self.draws:
            raise UserError(f"search.draws is {self.draws}, but the ranges hold about {len(found)} different trials")

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(one.path for one in self.also)

    def trials(self, rates: Sequence[float]) -> tuple[Trial, ...]:
        """Returns the trials: the grid over `rates`, which may have been extended, or the random draws."""
        if self.draws is not None:
            attempts = itertools.islice(self._drawn(), self.draws * MOST_ATTEMPTS)
            distinct = itertools.islice(_distinct(attempts), self.draws)
            return tuple(distinct)
        combinations = itertools.product(*(one.grid for one in self.also))
        others = [tuple(zip(self.paths, values, strict=True)) for values in combinations]
        return tuple(Trial(rate=rate, also=also) for rate in rates for also in others)

    def edges(self, trial: Trial, rates: Sequence[float]) -> tuple[str, ...]:
        """Returns the hyperparameters at whose edge a trial of these rates lies, by their short names."""
        drawn = self.draws is not None
        outer = _is_outer(trial.rate, rates[0], rates[-1]) if drawn else trial.rate in (rates[0], rates[-1])
        values = dict(trial.also)
        names = short_names(self.paths)
        found = [names[one.path] for one in self.also if one.is_at_edge(values[one.path], drawn)]
        return (*([RATE] if outer else []), *found)

    def suffix(self, trial: Trial) -> str:
        """Returns what the name of a run ends in, before its seed.

        >>> Search(rates=(1e-3, 2e-3)).suffix(Trial(rate=1e-3))
        '-lr0.001'
        """
        names = short_names(self.paths)
        return f"-lr{trial.rate:g}" + "".join(f"-{names[path]}{_text(value)}" for path, value in trial.also)

    def _drawn(self) -> Iterator[Trial]:
        """Yields draws without end. Each hyperparameter has dice of its own, which its name and the seed decide."""
        rate = LogRange(path=RATE, low=float(self.rates[0]), high=float(self.rates[-1]))
        dice = [(one, random.Random(f"{self.draw_seed} {one.path}")) for one in (rate, *self.also)]
        while True:
            values = [one.draw(die) for one, die in dice]
            yield Trial(rate=float(values[0]), also=tuple(zip(self.paths, values[1:], strict=True)))


def with_trial(run: Run, trial: Trial) -> Run:
    """Returns the run with the learning rate and the other hyperparameters of a trial."""
    for path, value in trial.also:
        run = _replaced(run, path.split("."), value)
    return dataclasses.replace(run, learning_rate=trial.rate)


def check_search(search: Search, arms: Mapping[str, Run]) -> None:
    """Raises UserError for a hyperparameter that an arm does not have, a value that it may not have, and for one that
    is no matter of tuning: trials train on the same examples, at the same cost.
    """
    for one in search.also:
        tunable = one.path.startswith(("train.", "model.")) and decides_result(one.path)
        if not tunable or one.path.startswith(("train.seed", "train.budget")):
            raise UserError(
                f"search.also has {one.path!r}: it may name numbers of train and model that decide the trained model, "
                "apart from train.seed and train.budget; make values of other fields arms of the study"
            )
        for name, arm in arms.items():
            for value in one.grid:
                try:
                    tried = apply_overrides(arm, [f"{one.path}={value!r}"])
                except UserError as error:
                    raise UserError(f"search.also, arm {name!r}: {error}") from None
                if (tried.steps, tried.flops_per_step) != (arm.steps, arm.flops_per_step):
                    raise UserError(
                        f"search.also has {one.path!r}, which changes the FLOPs of arm {name!r}: a search compares "
                        "trials of equal cost; make its values arms of the study"
                    )


def _replaced(config: Any, keys: Sequence[str], value: int | float) -> Any:
    head, *rest = keys
    return dataclasses.replace(config, **{head: _replaced(getattr(config, head), rest, value) if rest else value})


def _equal_ratios(rates: Sequence[float]) -> list[float]:
    ratio = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
    return [float(f"{rates[0] * ratio**i:.3g}") for i in range(len(rates))]


def _is_outer(value: float, low: float, high: float) -> bool:
    """Returns whether a value lies in the outer tenth of a logarithmic range, at either end."""
    return not OUTER <= math.log(value / low) / math.log(high / low) <= 1 - OUTER


def _distinct(trials: Iterator[Trial]) -> Iterator[Trial]:
    seen = set()
    for trial in trials:
        if trial not in seen:
            seen.add(trial)
            yield trial


def _text(value: int | float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
