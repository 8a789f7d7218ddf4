"""Pairs the answers of several runs to the same examples."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

from common.report.run_files import FinishedRun, ScoredSample

Key = tuple[str, str, str, int]
"""Split, inputs and target of an example, and how many equal ones came before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedExample:
    """One example with each run's answer; `answers` has the order of the runs, None where a run kept no sample."""

    split: str
    group: str
    inputs: str
    target: str
    answers: tuple[ScoredSample | None, ...]

    @property
    def wrong(self) -> int:
        """The number of runs that got it wrong."""
        return sum(answer is not None and not answer.correct for answer in self.answers)


def pair_examples(runs: Sequence[FinishedRun]) -> tuple[PairedExample, ...]:
    """Pairs the runs' samples by split, input and target; repeated ones are paired in order."""
    by_run = [dict(samples_by_key(run.samples)) for run in runs]
    keys = dict.fromkeys(key for samples in by_run for key in samples)
    examples = []
    for key in keys:
        answers = tuple(samples.get(key) for samples in by_run)
        known = next(answer for answer in answers if answer is not None)
        group = known.group or ""
        examples.append(
            PairedExample(split=known.split, group=group, inputs=known.inputs, target=known.target, answers=answers)
        )
    return tuple(examples)


def samples_by_key(samples: Sequence[ScoredSample]) -> Iterator[tuple[Key, ScoredSample]]:
    """Yields samples with the key that pairs them: split, inputs, target, and the number of earlier repetitions."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for sample in samples:
        key = (sample.split, sample.inputs, sample.target)
        yield (*key, seen[key]), sample
        seen[key] += 1
