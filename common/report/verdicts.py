"""What a comparison shows and what it does not: sentences over paired examples."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np

from common.analysis.statistics import compare_paired, verdict_line
from common.report.run_files import ArmRun, Run, Sample
from common.report.tables import find_score, splits
from common.report.units import scientific, si


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One example and what each arm made of it; `answers` follow the arms, None where an arm kept none."""

    split: str
    group: str
    inputs: str
    target: str
    answers: tuple[Sample | None, ...]

    @property
    def wrong(self) -> int:
        return sum(answer is not None and not answer.correct for answer in self.answers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A sentence, and the counts behind it ("" where there are none)."""

    text: str
    detail: str = ""


def pair_examples(arms: tuple[ArmRun, ...]) -> tuple[Example, ...]:
    """The arms' samples brought together by split, input and target; repeated ones pair in order."""
    by_arm = [dict(_keyed(arm.samples)) for arm in arms]
    keys = dict.fromkeys(key for samples in by_arm for key in samples)
    examples = []
    for key in keys:
        answers = tuple(samples.get(key) for samples in by_arm)
        known = next(answer for answer in answers if answer is not None)
        group = known.group or ""
        examples.append(
            Example(split=known.split, group=group, inputs=known.inputs, target=known.target, answers=answers)
        )
    return tuple(examples)


def _keyed(samples: tuple[Sample, ...]) -> Iterator[tuple[tuple[str, str, str, int], Sample]]:
    seen: Counter[tuple[str, str, str]] = Counter()
    for sample in samples:
        key = (sample.split, sample.inputs, sample.target)
        yield (*key, seen[key]), sample
        seen[key] += 1


def verdicts(run: Run) -> tuple[Verdict, ...]:
    """Sentences for each split and pair of arms (the first against each other one), and one on the validation loss."""
    examples = pair_examples(run.arms)
    lines = [
        line
        for split in splits(run.results)
        for other in range(1, len(run.arms))
        for line in _compare(run, examples, split, other)
    ]
    losses = ", ".join(f"{r.arm} {r.validation_loss:.4f}" for r in run.results)
    return (*lines, Verdict(text=f"Validation loss: {losses} nats per token."))


def caveat(run: Run) -> str:
    """What no interval in this report covers."""
    largest = max(run.results, key=lambda result: result.parameters)
    return (
        "Each arm was trained once: the intervals cover the choice of examples, not another seed or order of data, and "
        f"at this size ({si(largest.parameters)} parameters, {scientific(largest.flops.full_attention, 2)} training "
        "FLOPs an arm) nothing follows for larger models."
    )


def _compare(run: Run, examples: tuple[Example, ...], split: str, other: int) -> list[Verdict]:
    """By exact match and, where it is scored, by BLEU; the experiment's headline first."""
    first, second = run.arms[0], run.arms[other]
    pairs = [
        (a, b)
        for example in examples
        if example.split == split and (a := example.answers[0]) and (b := example.answers[other])
    ]
    scores = [find_score(arm.result, split, "all") for arm in (first, second)]
    scored = {score.examples if score else 0 for score in scores}
    if scored != {len(pairs)}:
        # a selection of samples (errors first, say) must not pass for the whole split
        text = f"Exact match, {split}: {first.name} and {second.name} are not compared example by example"
        counts = " and ".join(f"{n:,}" for n in sorted(scored))
        return [Verdict(text=f"{text}: samples.jsonl pairs {len(pairs):,} of {counts} examples.")]
    exact = _compare_exactly(split, first.name, second.name, pairs)
    if not all(score and score.bleu for score in scores):
        return [exact]
    bleu = _compare_bleu(split, first.name, second.name, pairs)
    return [bleu, exact] if headline(run) == "bleu" else [exact, bleu]


def headline(run: Run) -> str:
    """Which score stands first: "exact_match" or "bleu"."""
    return run.experiment.get("evaluation", {}).get("headline", "exact_match")


def _compare_bleu(split: str, first: str, second: str, pairs: list[tuple[Sample, Sample]]) -> Verdict:
    from common.evals.text_metrics import bleu_difference

    ours, theirs = ([pair[side].prediction for pair in pairs] for side in (0, 1))
    found = bleu_difference(ours, theirs, [a.target for a, _ in pairs])
    low, value, high = (f"{x:+.1f}".replace("-", "−") for x in (found.low, found.value, found.high))
    better = first if found.value > 0 else second
    resolved = found.low > 0 or found.high < 0
    verdict = f"{better} is better on these examples" if resolved else "no difference resolved"
    return Verdict(text=f"BLEU, {split}: {first} − {second} = {value} [{low}, {high}], n = {len(pairs):,}: {verdict}.")


def _compare_exactly(split: str, first: str, second: str, pairs: list[tuple[Sample, Sample]]) -> Verdict:
    correct_E2 = np.array([(a.correct, b.correct) for a, b in pairs], bool)
    compared = compare_paired(correct_E2[:, 0], correct_E2[:, 1])
    detail = (
        f"both right {compared.both:,}, only {first} {compared.only_first:,}, "
        f"only {second} {compared.only_second:,}, both wrong {compared.neither:,}"
    )
    return Verdict(text=f"Exact match, {split}: {verdict_line(first, second, compared)}.", detail=detail)
