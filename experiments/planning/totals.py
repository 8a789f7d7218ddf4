"""What a whole study takes: its runs, and whatever each run of an arm takes, added up over them."""

import dataclasses
import math
from collections.abc import Mapping

import jax

from common.train.programs import make_programs
from common.train.state import abstract_state
from experiments.members import members_of, most_runs
from experiments.run import Run
from experiments.running.pipeline import make_setup
from experiments.search import Search
from experiments.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunCount:
    """How many runs a study has; every arm has as many as the others."""

    first: int
    """Runs that are known before any is trained."""
    least: int
    """All runs, if no best rate lies at the edge of the search."""
    most: int
    """All runs, if the search is extended as far as it may be."""

    @classmethod
    def of(cls, study: Study) -> "RunCount":
        narrow = study.search and dataclasses.replace(study.search, extend=0)
        return cls(
            first=len(members_of(study, {}).members),
            least=most_runs(dataclasses.replace(study, search=narrow)),
            most=most_runs(study),
        )

    def over(self, of_arm: Mapping[str, float]) -> tuple[float, float]:
        """Adds up, for the least and for the most runs, what one run of each arm takes."""
        one_of_each = math.fsum(of_arm.values())
        return self.least / len(of_arm) * one_of_each, self.most / len(of_arm) * one_of_each


def describe_runs(study: Study, count: RunCount) -> str:
    """Returns the number of runs and where it comes from, in words."""
    arms, seeds = _number(len(study.arms), "arm"), _number(study.seeds, "seed")
    if study.search is None:
        return f"{count.least:,} ({arms} x {seeds})"
    trials = min(study.search.seeds, study.seeds)
    more = study.seeds - trials
    words = f"{count.least:,} ({arms} x {_trials(study.search)} x {_number(trials, 'seed')}"
    words += f", then {_number(more, 'more seed')} {_best(study.search)})" if more else ")"
    return words + (f"; {count.most:,} if the search is extended all the way" if count.most > count.least else "")


def _trials(search: Search) -> str:
    if search.draws is not None:
        return _number(search.draws, "random draw")
    others = [f"{len(one.grid)} values of {one.path.rpartition('.')[2]}" for one in search.also]
    return " x ".join([_number(len(search.rates), "rate"), *others])


def _best(search: Search) -> str:
    return "with the best trial" if search.also or search.draws else "at the best rate"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def kept_checkpoints(run: Run) -> int:
    """Returns how many checkpoints a finished run keeps at most: the newest ones, and the best one."""
    made = -(-run.steps // run.train.checkpoint_every)
    return min(made, run.train.keep_last + 1)


def state_bytes(run: Run) -> int:
    """Returns the bytes of the parameters and the optimizer's state, over all devices: what a checkpoint holds."""
    programs = make_programs(make_setup(run))
    state = abstract_state(programs.model, programs.optimizer, programs.shardings)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
