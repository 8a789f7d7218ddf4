"""What a study's search tried for each arm, and what it chose."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.analysis.effort import efforts_that_reverse, expected_best
from common.analysis.resolution import Tuning
from common.report.run_files import StudyRuns
from common.report.run_list import Choice, Trial, short_names

if TYPE_CHECKING:
    from common.report.findings import Findings

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


def reversals(trials: Sequence[ArmTrials], findings: "Findings") -> Iterator[str]:
    """Yields a sentence for each two compared arms whose order depends on how many trials there were."""
    by_arm = {arm.arm: list(arm.means.values()) for arm in trials}
    for pair in dict.fromkeys((finding.first, finding.second) for finding in findings.found):
        if not by_arm.keys() >= set(pair):  # effects of factors are of no single arm
            continue
        losses = [by_arm[arm] for arm in pair]
        if not losses[0] or len(losses[0]) != len(losses[1]):
            yield f"{pair[0]} and {pair[1]} have {len(losses[0])} and {len(losses[1])} trials."
        elif efforts := efforts_that_reverse(*losses):
            better = pair[0] if min(losses[0]) < min(losses[1]) else pair[1]
            counts = ", ".join(map(str, efforts))
            yield (
                f"{better} has the lower best loss of {pair[0]} and {pair[1]}, but with {counts} of "
                f"{len(losses[0])} trials the other one is expected to be ahead."
            )
