"""What a study's search tried for each arm, and what it chose."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from common.analysis.effort import counts, efforts_that_reverse, expected_best, expected_of_best
from common.analysis.resolution import Tuning
from common.report.run_files import FinishedRun, StudyRuns
from common.report.run_list import Choice, Trial, short_names

RATE = "learning_rate"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmTrials:
    """The trials of one arm."""

    arm: str
    losses: Mapping[Trial, Sequence[float]]
    """Final validation losses by trial, at ascending rates: one for each seed; infinite where it diverged."""
    choice: Choice | None
    """None while the search goes on."""

    @property
    def means(self) -> dict[Trial, float]:
        """The mean loss of each trial; infinite where a run diverged."""
        return {
            trial: math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf
            for trial, losses in self.losses.items()
        }

    @property
    def expected_best(self) -> list[float]:
        """The expected loss of the best of 1, 2, ... trials."""
        return [float(loss) for loss in expected_best(list(self.means.values()))] if self.losses else []


def trials_of(study: StudyRuns) -> tuple[ArmTrials, ...]:
    """Returns the finished trials of each arm in the order of `first_seed`; empty for a study without a search."""
    if not (search := study.study.get("search")):
        return ()
    results = {run.name: run.result.validation_loss for run in study.runs}
    found: dict[str, dict[Trial, list[float]]] = {run.arm: {} for run in study.first_seed}
    for run in sorted(study.listed.runs, key=lambda run: (run.trial.rate, run.trial.also)):
        loss = results.get(run.name, math.inf if run.diverged else None)
        if loss is not None and run.seed < search["seeds"] and run.arm in found:
            found[run.arm].setdefault(run.trial, []).append(loss)
    return tuple(
        ArmTrials(arm=arm, losses=losses, choice=study.listed.chosen.get(arm)) for arm, losses in found.items()
    )


def tuning(study: StudyRuns, arm: str) -> Tuning | None:
    """Returns how an arm's hyperparameters were searched for; None if they were not, or the search goes on."""
    search, choice = study.study.get("search"), study.listed.chosen.get(arm)
    if not search or choice is None:
        return None
    rates = [float(rate) for rate in search["rates"]]
    rates += [run.trial.rate for run in study.listed.runs if run.arm == arm]
    also = search.get("also", ())
    names = short_names([one["path"] for one in also])
    parts = [f"{RATE} {min(rates):g}..{max(rates):g}", *(f"{names[one['path']]} {_values(one)}" for one in also)]
    edges = choice.edges or ((RATE,) if choice.at_edge else ())
    draws = f"{search['draws']} random draws of " if search.get("draws") else ""
    seeds = f"{search['seeds']} seed{'s' * (search['seeds'] > 1)}"
    return Tuning(
        space=f"{draws}{', '.join(parts)}, mean validation loss over {seeds}",
        trials=choice.trials,
        edges=tuple("learning rate" if name == RATE else name for name in edges),
    )


def _values(one: Mapping[str, Any]) -> str:
    """Returns what a hyperparameter of a study's stored search may be."""
    return f"{one['low']:g}..{one['high']:g}" if "low" in one else " or ".join(f"{value:g}" for value in one["values"])


def by_effort(
    study: StudyRuns, arm: str, value_of: Callable[[FinishedRun], float | None], worst: float
) -> tuple[float, ...]:
    """Returns what a measure of an arm is expected to be with the best of 1, 2, ... of its trials by validation loss.

    Empty where that is not known: without a search, while it goes on, and where a trial lacks the measure. `worst` is
    the value of a trial that diverged.
    """
    search, choice = study.study.get("search"), study.listed.chosen.get(arm)
    if not search or choice is None:
        return ()
    done = {run.name: run for run in study.runs}
    found: dict[Trial, list[tuple[float, float | None]]] = {}
    for listed in study.listed.runs:
        if listed.arm != arm or listed.seed >= search["seeds"] or not (listed.name in done or listed.diverged):
            continue
        run = done.get(listed.name)
        loss = math.inf if run is None else run.result.validation_loss
        value = value_of(run) if run is not None and math.isfinite(loss) else worst
        found.setdefault(listed.trial, []).append((loss, value))
    losses, values = [], []
    for pairs in found.values():
        known = [value for _, value in pairs if value is not None]
        if len(known) < len(pairs):
            return ()
        losses.append(sum(loss for loss, _ in pairs) / len(pairs))
        values.append(sum(known) / len(known))
    return tuple(expected_of_best(losses, values).tolist()) if len(losses) == choice.trials else ()


def reversals(trials: Sequence[ArmTrials], pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yields a sentence for each two compared arms whose order by loss depends on how many trials there were."""
    by_arm = {arm.arm: arm.expected_best for arm in trials}
    for first, second in dict.fromkeys(pairs):
        if not by_arm.keys() >= {first, second}:  # effects of factors are of no single arm
            continue
        count = len(by_arm[first])
        if not count or count != len(by_arm[second]):
            yield f"{first} and {second} have {count} and {len(by_arm[second])} trials."
        elif efforts := efforts_that_reverse(by_arm[first], by_arm[second]):
            better = first if by_arm[first][-1] < by_arm[second][-1] else second
            few = "" if any(counts(effort, count) for effort in efforts) else ", too few to count against a difference"
            yield (
                f"{better} has the lower best loss of {first} and {second}, but with {', '.join(map(str, efforts))} of "
                f"{count} trials the other one is expected to be ahead{few}."
            )
