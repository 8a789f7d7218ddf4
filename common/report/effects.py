"""Effects of a study's factors, as claims to be decided with all others of its report."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from common.analysis.factorial import Cell, Contrast, contrasts, split_by
from common.analysis.resolution import Claim, ComparedArm, Tuning
from common.analysis.seeds import compare_seeds
from common.report.run_files import FinishedRun, StudyRuns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effect:
    """What a factor, or two together, do to a measure on average over the other factors."""

    first: str
    """What is compared, such as `parameters=shared`."""
    second: str
    claim: Claim


def effects(
    study: StudyRuns,
    value_of: Callable[[FinishedRun], float | None],
    tuning_of: Callable[[str], Tuning | None],
    by_effort_of: Callable[[str], Sequence[float]],
    differs: tuple[str, ...],
) -> Iterator[Effect]:
    """Yields the main effects of the study's factors, then the interactions of two; none while a cell has no run.

    Args:
      value_of: the measure; runs without a value do not count.
      tuning_of: how an arm was tuned.
      by_effort_of: what the measure of an arm is expected to be with the best of 1, 2, ... trials.
      differs: what the certificate found to differ between the arms against the study's claims.
    """
    names = tuple(study.study.get("factors", ()))
    levels = _levels(study, names)
    cells: dict[Cell, dict[int, float]] = {}
    arms: dict[Cell, str] = {}
    for run in study.compared:
        if (value := value_of(run)) is not None:
            cell = tuple(levels[name].index(run.listed.labels[name]) for name in names)
            cells.setdefault(cell, {})[run.seed] = value
            arms[cell] = run.arm
    if not names or len(cells) < 2 ** len(names) or not set.intersection(*(set(cell) for cell in cells.values())):
        return
    tuning = _least(study, tuning_of)
    curves = {cell: by_effort_of(arm) for cell, arm in arms.items()}
    for contrast in contrasts(names):
        first, second = _sides(contrast, levels)
        of_first, of_second = _by_effort(contrast, names, curves)
        claim = Claim(
            first=ComparedArm(name=first, tuning=tuning, by_effort=of_first),
            second=ComparedArm(name=second, tuning=tuning, by_effort=of_second),
            compared=compare_seeds(*split_by(contrast, names, cells)),
            differs=differs,
        )
        yield Effect(first=first, second=second, claim=claim)


def _by_effort(
    contrast: Contrast, names: Sequence[str], curves: Mapping[Cell, Sequence[float]]
) -> list[tuple[float, ...]]:
    """Returns both halves' means over cells at each search effort; empty where a cell's are not known."""
    if len({len(curve) for curve in curves.values()}) > 1:
        return [(), ()]
    halves = split_by(contrast, names, {cell: dict(enumerate(curve)) for cell, curve in curves.items()})
    return [tuple(half[effort] for effort in sorted(half)) for half in halves]


def _levels(study: StudyRuns, names: tuple[str, ...]) -> dict[str, list[str | int | float]]:
    """Returns the two values of each factor, that of the study's first arm first."""
    return {name: list(dict.fromkeys(run.labels[name] for run in study.listed.runs)) for name in names}


def _sides(contrast: Contrast, levels: Mapping[str, list[str | int | float]]) -> tuple[str, str]:
    """Returns names for the two halves of the cells that a contrast compares."""
    if len(contrast.factors) == 1:
        (name,) = contrast.factors
        return f"{name}={levels[name][1]}", f"{name}={levels[name][0]}"
    both = " and ".join(f"{name}={levels[name][1]}" for name in contrast.factors)
    return f"both or neither of {both}", "one of them"


def _least(study: StudyRuns, tuning_of: Callable[[str], Tuning | None]) -> Tuning | None:
    """Returns the tuning of the arm that was tuned least: an effect rests on every arm."""
    arms = dict.fromkeys(run.arm for run in study.listed.runs)
    found = [tuning_of(arm) for arm in arms]
    known = [tuning for tuning in found if tuning is not None]
    if len(known) < len(found):
        return None
    return min(known, key=lambda tuning: (not tuning.edges, tuning.trials))
