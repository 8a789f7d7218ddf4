"""What a study found: differences between arms over seeds, each resolved or not, and why not.

Legend: S seeds, E examples.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from common.analysis.interval import Interval
from common.analysis.resolution import Claim, ComparedArm, Resolution, decide
from common.analysis.seeds import SeedComparison, compare_seeds, crossed_interval
from common.report.certificate import differences
from common.report.claims import Parity
from common.report.effects import effects
from common.report.examples import Key, samples_by_key
from common.report.parity import groups
from common.report.run_files import FinishedRun, StudyRuns
from common.report.search import by_effort, tuning
from common.report.tables import find_score, splits
from common.report.units import p_text

Answers = Mapping[tuple[str, str], Mapping[Key, bool]]
"""By run and split: which examples it got right."""
FEW_ARMS = 4
"""In groups of at most so many arms every pair is compared, in larger ones each arm with the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """A number that arms are compared by."""

    metric: Literal["loss", "exact_match", "bleu"]
    split: str = ""
    """The scored split; empty for the validation loss."""

    @property
    def name(self) -> str:
        names = {"loss": "validation loss", "exact_match": f"exact match, {self.split}", "bleu": f"BLEU, {self.split}"}
        return names[self.metric]

    @property
    def unit(self) -> str:
        return {"loss": "nats per token", "exact_match": "points", "bleu": "BLEU"}[self.metric]

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "loss"

    def of(self, run: FinishedRun) -> float | None:
        """Returns a run's value in `unit`; None if it has none, or none that is finite."""
        if self.metric == "loss":
            return run.result.validation_loss if math.isfinite(run.result.validation_loss) else None
        score = find_score(run.result, self.split, "all")
        if self.metric == "bleu":
            return score.bleu.value if score and score.bleu else None
        return 100 * score.exact_match.value if score else None

    def shown(self, value: float, signed: bool = False) -> str:
        """Formats a value of it without its unit.

        >>> Measure(metric="loss").shown(-0.05, signed=True), Measure(metric="bleu").shown(21.333)
        ('−0.0500', '21.33')
        """
        digits = 4 if self.metric == "loss" else 2
        return (f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}").replace("-", "−").replace("inf", "∞")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """A difference between two arms, first - second."""

    first: str
    second: str
    measure: Measure
    compared: SeedComparison
    crossed: Interval | None
    """The same difference for other seeds and other examples; None where the runs answered different examples."""
    resolution: Resolution

    @property
    def answer(self) -> str:
        """Whether it is resolved, or every reason why not."""
        if self.resolution.resolved:
            return f"resolved: {self.better} is better"
        return f"not resolved: {'; '.join(self.resolution.reasons)}"

    @property
    def sentence(self) -> str:
        return f"{self._numbers}; {self.answer}."

    @property
    def detail(self) -> str:
        """What the study could have seen, and how far the difference is one of these examples."""
        measure, compared = self.measure, self.compared
        parts = []
        if math.isfinite(compared.smallest):
            smallest = f"{measure.shown(compared.smallest)} {measure.unit}"
            parts.append(
                f"{len(compared.seeds)} seeds with this spread show a difference of {smallest} in 4 of 5 cases"
            )
        if self.crossed is not None:
            parts.append(f"for other seeds and other examples {self.shown(self.crossed)}")
        if compared.unpaired:
            parts.append(f"seeds that only one arm has: {', '.join(map(str, compared.unpaired))}")
        return "; ".join(parts)

    def shown(self, interval: Interval) -> str:
        """Formats a difference by this measure with its interval, which one seed does not have."""
        value, low, high = (self.measure.shown(x, signed=True) for x in (interval.value, interval.low, interval.high))
        return f"{value} [{low}, {high}]" if math.isfinite(interval.low) else value

    @property
    def _numbers(self) -> str:
        measure, seeds = self.measure, len(self.compared.seeds)
        difference = f"{self.first} − {self.second} = {self.shown(self.compared.difference)} {measure.unit}"
        p_values = f", {p_text(self.resolution.p_value)} after correction" if seeds > 1 else ""
        name = measure.name[0].upper() + measure.name[1:]
        return f"{name}: {difference}, n = {seeds} seed{'s' * (seeds > 1)}{p_values}"

    @property
    def better(self) -> str:
        return self.first if (self.compared.difference.value > 0) == self.measure.higher_is_better else self.second


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pair:
    """Two arms that some claim of parity compares, with their runs by seed."""

    first: Mapping[int, FinishedRun]
    second: Mapping[int, FinishedRun]
    differs: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """All comparisons of a study, decided together."""

    found: tuple[Finding, ...]
    uncompared: tuple[str, ...]
    """Sentences on arms that cannot be compared by a measure."""


def find(study: StudyRuns) -> Findings:
    """Compares the arms of each parity claim's groups over seeds, by validation loss and by the headline score.

    A study of crossed factors compares what each factor does on average over the others, instead of single arms.
    Nothing else in a report decides whether a difference is resolved; `decide` does, for all comparisons together.
    """
    claims: dict[tuple[str, str, Measure], Claim] = {}
    answers = _answers(study)
    uncompared, pairs = [], _pairs(study)
    differs = tuple(dict.fromkeys(itertools.chain(*(pair.differs for pair in pairs.values()))))
    for measure in measures(study):
        for effect in effects(
            study, measure.of, functools.partial(tuning, study), functools.partial(_by_effort, study, measure), differs
        ):
            claims[effect.first, effect.second, measure] = effect.claim
    for (first, second), pair in pairs.items() if not claims else ():
        for measure in measures(study):
            try:
                claims[first, second, measure] = _claim(study, pair, measure, answers)
            except _IncomparableError as error:
                uncompared.append(f"{measure.name}: {first} and {second} are not compared, since {error}.")
    return Findings(
        found=tuple(
            Finding(
                first=first,
                second=second,
                measure=measure,
                compared=claim.compared,
                crossed=claim.crossed,
                resolution=resolution,
            )
            for ((first, second, measure), claim), resolution in zip(
                claims.items(), decide(list(claims.values())), strict=True
            )
        ),
        uncompared=tuple(uncompared),
    )


class _IncomparableError(Exception):
    """Says why two arms cannot be compared by a measure."""


def _claim(study: StudyRuns, pair: _Pair, measure: Measure, answers: Answers) -> Claim:
    values = [
        {seed: value for seed, run in runs.items() if (value := measure.of(run)) is not None}
        for runs in (pair.first, pair.second)
    ]
    seeds = sorted(values[0].keys() & values[1].keys())
    if not seeds:
        raise _IncomparableError("they have no seed in common with a value")
    firsts, seconds = [pair.first[seed] for seed in seeds], [pair.second[seed] for seed in seeds]
    if measure.metric == "bleu":
        scores = [find_score(run.result, measure.split, "all") for run in (*firsts, *seconds)]
        if len({score.bleu_signature for score in scores if score}) > 1:
            raise _IncomparableError("they were scored in different ways")
    return Claim(
        first=_compared_arm(study, firsts[0].arm, measure),
        second=_compared_arm(study, seconds[0].arm, measure),
        compared=compare_seeds(*values),
        crossed=_over_examples(firsts, seconds, measure, answers),
        differs=pair.differs,
    )


def _compared_arm(study: StudyRuns, arm: str, measure: Measure) -> ComparedArm:
    return ComparedArm(name=arm, tuning=tuning(study, arm), by_effort=_by_effort(study, measure, arm))


def _by_effort(study: StudyRuns, measure: Measure, arm: str) -> tuple[float, ...]:
    return by_effort(study, arm, measure.of, worst=0.0 if measure.higher_is_better else math.inf)


def measures(study: StudyRuns) -> tuple[Measure, ...]:
    """Returns what arms are compared by: validation loss, and the headline score of every split that has one."""
    metric = headline(study)
    found = [Measure(metric=metric, split=split) for split in splits([run.result for run in study.compared])]
    scores = [measure for measure in found if any(measure.of(run) is not None for run in study.compared)]
    return (Measure(metric="loss"), *scores)


def headline(study: StudyRuns) -> Literal["exact_match", "bleu"]:
    """Returns the metric that comes first."""
    places = [run.config.get("evaluation") for run in study.first_seed] + [study.study.get("evaluation")]
    found = next((place["headline"] for place in places if place and "headline" in place), "exact_match")
    return "bleu" if found == "bleu" else "exact_match"


def _pairs(study: StudyRuns) -> dict[tuple[str, str], _Pair]:
    """Returns the pairs of arms to compare, in the study's order, with what the certificate has against them."""
    by_arm: dict[str, dict[int, FinishedRun]] = {}
    for run in study.compared:
        by_arm.setdefault(run.arm, {})[run.seed] = run
    claims: dict[tuple[str, str], list[Parity]] = {}
    for claim in study.parity:
        for group in groups(study, claim).values():
            for pair in _pairs_of(dict.fromkeys(run.arm for run in group.values())):
                found = claims.setdefault(pair, [])
                if claim not in found:
                    found.append(claim)
    return {
        (first, second): _Pair(
            first=by_arm[first],
            second=by_arm[second],
            differs=tuple(dict.fromkeys(_differences(by_arm[first], by_arm[second], found))),
        )
        for (first, second), found in claims.items()
    }


def _pairs_of(arms: Iterable[str]) -> Iterator[tuple[str, str]]:
    pairs = list(itertools.combinations(arms, 2))
    yield from pairs if len(pairs) <= math.comb(FEW_ARMS, 2) else [pair for pair in pairs if pair[0] == pairs[0][0]]


def _differences(
    first: Mapping[int, FinishedRun], second: Mapping[int, FinishedRun], claims: Sequence[Parity]
) -> Iterator[str]:
    for claim in claims:
        for seed in first.keys() & second.keys():
            yield from differences(first[seed], second[seed], claim)
    runs = (*first.values(), *second.values())
    if diverged := [run.name for run in runs if not math.isfinite(run.result.validation_loss)]:
        yield f"which runs diverged ({', '.join(diverged)})"


def _answers(study: StudyRuns) -> Answers:
    found: dict[tuple[str, str], dict[Key, bool]] = {}
    for run in study.compared:
        for key, sample in samples_by_key(run.samples):
            found.setdefault((run.name, sample.split), {})[key] = sample.correct
    return found


def _over_examples(
    first: Sequence[FinishedRun], second: Sequence[FinishedRun], measure: Measure, answers: Answers
) -> Interval | None:
    """Returns the difference in points for other seeds and examples, where all runs answered the same examples.

    `first` and `second` have the order of the seeds.
    """
    if measure.metric != "exact_match" or len(first) < 2:
        return None
    runs = [*first, *second]
    by_run = [answers.get((run.name, measure.split), {}) for run in runs]
    scores = [find_score(run.result, measure.split, "all") for run in runs]
    keys = by_run[0].keys()
    # samples.jsonl may hold a part of the split, such as errors only, which must not count as the whole.
    is_whole = all(score is not None and score.examples == len(keys) for score in scores)
    if len(keys) < 2 or not is_whole or any(other.keys() != keys for other in by_run):
        return None
    correct_RE = np.array([[found[key] for key in keys] for found in by_run], float)
    return crossed_interval(100 * (correct_RE[: len(first)] - correct_RE[len(first) :]))
