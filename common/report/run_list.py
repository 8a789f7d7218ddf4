"""Which runs a study has so far, and what its search tried and chose: the contents of `runs.json`."""

import dataclasses
from collections.abc import Sequence


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Returns the end of each dotted path, as long as it takes to tell it from the others.

    >>> short_names(["train.schedule.warmup_steps", "train.optimizer.epsilon", "model.recipe.epsilon"]).values()
    dict_values(['warmup_steps', 'optimizer.epsilon', 'recipe.epsilon'])
    """
    ends = {path: [path.split(".", i)[-1] for i in range(path.count("."), -1, -1)] for path in paths}
    taken = [end for found in ends.values() for end in found]
    return {path: next((end for end in found if taken.count(end) == 1), path) for path, found in ends.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """The hyperparameters that a study's search tries together."""

    rate: float
    also: tuple[tuple[str, int | float], ...] = ()
    """Values of further hyperparameters by dotted path, in the order in which the search names them."""

    @property
    def words(self) -> str:
        """
        >>> Trial(rate=0.002, also=(("train.optimizer.weight_decay", 0.1),)).words
        '0.002, weight_decay 0.1'
        """
        names = short_names([path for path, _ in self.also])
        others = [f"{names[path]} {value:g}" for path, value in self.also]
        return ", ".join([f"{self.rate:g}", *others])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a study's search chose for an arm."""

    rate: float
    """The learning rate."""
    also: dict[str, int | float] = dataclasses.field(default_factory=dict)
    """The values of further hyperparameters, by dotted path."""
    at_edge: bool
    """Whether a better trial may lie beyond what was tried."""
    edges: tuple[str, ...] = ()
    """The hyperparameters of which that is so; absent in what earlier versions wrote, which tried rates only."""
    trials: int
    """How many trials there were."""

    @property
    def trial(self) -> Trial:
        return Trial(rate=self.rate, also=tuple(self.also.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run of a study, as `runs.json` lists it."""

    name: str
    arm: str
    seed: int
    identity: str
    folder: str
    """Its run directory, relative to the study's."""
    labels: dict[str, str | int | float]
    """The arm's labels, with `arm`, `seed` and `learning_rate`."""
    compared: bool
    """Whether arms are compared by it; False for a trial that the search did not choose."""
    tried: dict[str, int | float] = dataclasses.field(default_factory=dict)
    """What the run has of the further hyperparameters of the study's search, by dotted path."""
    diverged: bool = False
    """Whether it diverged: it has no result then, and counts as the worst of trials."""

    @property
    def trial(self) -> Trial:
        return Trial(rate=float(self.labels["learning_rate"]), also=tuple(self.tried.items()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunList:
    """The contents of `runs.json`."""

    runs: tuple[ListedRun, ...]
    """In the study's order."""
    chosen: dict[str, Choice] = dataclasses.field(default_factory=dict)
    """By arm; empty without a search, or before the arm's trials are done."""
    complete: bool
    """Whether no run will be added, however the listed ones end."""
    overrides: tuple[str, ...] = ()
    """The command line's, which the study's config contains."""
