"""What a study's search of learning rates tried, and what it chose."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from common.analysis.effort import efforts_that_reverse, expected_best
from common.report.findings import Findings
from common.report.run_files import Choice, StudyRuns


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmTrials:
    """The trials of one arm."""

    arm: str
    losses: Mapping[float, Sequence[float]]
    """Final validation losses by learning rate, ascending: one for each seed of a trial."""
    choice: Choice | None
    """None while the search goes on."""

    @property
    def means(self) -> dict[float, float]:
        """The mean loss of each trial; infinite where a run diverged."""
        return {
            rate: math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf
            for rate, losses in self.losses.items()
        }

    @property
    def expected_best(self) -> list[float]:
        """The expected loss of the best of 1, 2, ... trials."""
        return [float(loss) for loss in expected_best(list(self.means.values()))] if self.losses else []


def trials_of(study: StudyRuns) -> tuple[ArmTrials, ...]:
    """Returns the finished trials of each arm in the order of `first_seed`; empty for a study without a search."""
    if not (search := study.study.get("search")):
        return ()
    found: dict[str, dict[float, list[float]]] = {run.arm: {} for run in study.first_seed}
    for run in sorted(study.runs, key=lambda run: run.rate):
        if run.seed < search["seeds"] and run.arm in found:
            found[run.arm].setdefault(run.rate, []).append(run.result.validation_loss)
    return tuple(
        ArmTrials(arm=arm, losses=losses, choice=study.listed.chosen.get(arm)) for arm, losses in found.items()
    )


def reversals(trials: Sequence[ArmTrials], findings: Findings) -> Iterator[str]:
    """Yields a sentence for each two compared arms whose order depends on how many rates were tried."""
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
