"""States what a comparison shows and what it does not, from paired examples."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np

from common.analysis.interval import Interval
from common.analysis.statistics import CONFIDENCE, compare_paired, holm
from common.report.run_files import ArmRun, ComparisonRun, ScoredSample
from common.report.tables import find_score, splits
from common.report.units import scientific, si


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedExample:
    """One example with each arm's answer; `answers` has the order of the arms, None where an arm kept no sample."""

    split: str
    group: str
    inputs: str
    target: str
    answers: tuple[ScoredSample | None, ...]

    @property
    def wrong(self) -> int:
        """The number of arms that got it wrong."""
        return sum(answer is not None and not answer.correct for answer in self.answers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A sentence, and the counts that support it ("" if there are none)."""

    text: str
    detail: str = ""


def pair_examples(arms: tuple[ArmRun, ...]) -> tuple[PairedExample, ...]:
    """Pairs the arms' samples by split, input and target; repeated ones are paired in order."""
    by_arm = [dict(_samples_by_key(arm.samples)) for arm in arms]
    keys = dict.fromkeys(key for samples in by_arm for key in samples)
    examples = []
    for key in keys:
        answers = tuple(samples.get(key) for samples in by_arm)
        known = next(answer for answer in answers if answer is not None)
        group = known.group or ""
        examples.append(
            PairedExample(split=known.split, group=group, inputs=known.inputs, target=known.target, answers=answers)
        )
    return tuple(examples)


def _samples_by_key(samples: tuple[ScoredSample, ...]) -> Iterator[tuple[tuple[str, str, str, int], ScoredSample]]:
    """Yields samples with the key that pairs them: split, inputs, target, and the number of earlier repetitions."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for sample in samples:
        key = (sample.split, sample.inputs, sample.target)
        yield (*key, seen[key]), sample
        seen[key] += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Comparison:
    """One statistical test of two arms."""

    first: str
    second: str
    numbers: str
    """The difference with its interval, n and p-value."""
    difference: Interval
    p_value: float
    detail: str = ""


def verdicts(run: ComparisonRun) -> tuple[Verdict, ...]:
    """Compares the first arm with every other arm on every split; then come remarks on the whole run.

    The remarks: the number of comparisons, test texts found in the training data, arms without a result, and validation
    loss.
    """
    examples = pair_examples(run.arms)
    compared = [
        result
        for split in splits(run.results)
        for other in range(1, len(run.arms))
        for result in _compare(run, examples, split, other)
    ]
    tests = [result for result in compared if isinstance(result, _Comparison)]
    corrected = iter(holm([test.p_value for test in tests]))
    lines = [
        _verdict(result, next(corrected), len(tests), run) if isinstance(result, _Comparison) else result
        for result in compared
    ]
    if tests:
        lines.append(Verdict(text=_tests_sentence(len(tests))))
    lines += [Verdict(text=f"{line}.") for line in in_training(run)]
    if run.unfinished:
        lines.append(Verdict(text=f"Not in this report, because they have no result: {', '.join(run.unfinished)}."))
    losses = ", ".join(f"{r.arm} {r.validation_loss:.4f}" for r in run.results)
    return (*lines, Verdict(text=f"Validation loss: {losses} nats per token."))


def in_training(run: ComparisonRun) -> list[str]:
    """Returns one sentence per split on how many of its texts are in the training data; arms that agree share it."""
    counts = [(s.split, s.in_training) for r in run.results for s in r.scores if s.in_training is not None]
    return list(dict.fromkeys(known.sentence(split) for split, known in counts))


def _tests_sentence(tests: int) -> str:
    if tests == 1:
        return "This report makes 1 comparison."
    return (
        f"This report makes {tests} comparisons: by chance alone, one in 20 would look like a difference, so verdicts "
        f"use p-values corrected for {tests} comparisons (Holm)."
    )


def _verdict(test: _Comparison, corrected: float, tests: int, run: ComparisonRun) -> Verdict:
    """Calls a difference resolved if its interval excludes 0 and its corrected p-value is below 0.05.

    Both are required: the bootstrap interval is too narrow with few sentences, and a p-value alone does not show how
    small a difference is.
    """
    numbers = test.numbers + (f" ({_p_text(corrected)} corrected for {tests} comparisons)" if tests > 1 else "")
    outside = test.difference.low > 0 or test.difference.high < 0
    if not outside or corrected >= 1 - CONFIDENCE:
        return Verdict(text=f"{numbers}: no difference resolved.", detail=test.detail)
    better, worse = (test.first, test.second)[:: 1 if test.difference.value > 0 else -1]
    verdict = (
        f"the {better} model trained here{_seeds(run)} is better on these examples than the {worse} model; one seed "
        f"says nothing about {better} and {worse} in general"
    )
    return Verdict(text=f"{numbers}: {verdict}.", detail=test.detail)


def _seeds(run: ComparisonRun) -> str:
    """Names the seeds of the first arm; all arms of a comparison share them."""
    config = run.arms[0].config
    seeds = {name: config.get(name, {}).get("seed") for name in ("train", "data")}
    known = ", ".join(f"{name}.seed {seed}" for name, seed in seeds.items() if seed is not None)
    return f" ({known})" if known else ""


def caveat(run: ComparisonRun) -> str:
    """Returns what no interval in this report covers."""
    largest = max(run.results, key=lambda result: result.parameters)
    return (
        "Each arm was trained once: the intervals cover the choice of examples, not other seeds or data orders. "
        f"Results at this size ({si(largest.parameters)} parameters, {scientific(largest.flops.full_attention, 2)} "
        "training FLOPs per arm) say nothing about larger models."
    )


def _compare(
    run: ComparisonRun, examples: tuple[PairedExample, ...], split: str, other: int
) -> list[_Comparison | Verdict]:
    """Compares by exact match and, if both arms have one, by BLEU; the experiment's headline metric comes first."""
    first, second = run.arms[0], run.arms[other]
    pairs = [
        (a, b)
        for example in examples
        if example.split == split and (a := example.answers[0]) and (b := example.answers[other])
    ]
    scores = [find_score(arm.result, split, "all") for arm in (first, second)]
    scored = {score.examples if score else 0 for score in scores}
    if scored == {len(pairs)} == {0}:  # only other arms were scored on this split
        return []
    if scored != {len(pairs)}:
        # samples.jsonl may hold a part of the split, such as errors only, which must not count as the whole.
        text = f"Exact match, {split}: {first.name} and {second.name} are not compared example by example"
        counts = " and ".join(f"{n:,}" for n in sorted(scored))
        return [Verdict(text=f"{text}: samples.jsonl pairs {len(pairs):,} of {counts} examples.")]
    exact = _compare_exactly(split, first.name, second.name, pairs)
    bleus = [score.bleu_signature for score in scores if score and score.bleu]
    if len(bleus) < 2:
        return [exact]
    bleu = _compare_bleu(split, first.name, second.name, pairs, bleus)
    return [bleu, exact] if headline(run) == "bleu" else [exact, bleu]


def headline(run: ComparisonRun) -> str:
    """Returns the metric that comes first: "exact_match" or "bleu"."""
    return run.experiment.get("evaluation", {}).get("headline", "exact_match")


def _compare_bleu(
    split: str, first: str, second: str, pairs: list[tuple[ScoredSample, ScoredSample]], signatures: list[str | None]
) -> _Comparison | Verdict:
    from common.evals.bleu import JAPANESE, compare_bleu, has_mecab, tokenizer_in

    why = ""
    if len(set(signatures)) > 1:
        why = f"they were scored in different ways ({signatures[0]} and {signatures[1]})"
    elif tokenizer_in(signatures[0]) == JAPANESE and not has_mecab():
        why = 'they were scored with MeCab, which is not installed here (pip install "sacrebleu[ja]")'
    if why:
        return Verdict(text=f"BLEU, {split}: {first} and {second} are not compared, since {why}.")
    ours, theirs = ([pair[side].prediction for pair in pairs] for side in (0, 1))
    found = compare_bleu(ours, theirs, [a.target for a, _ in pairs], tokenizer_in(signatures[0]))
    low, value, high = (_signed(x) for x in (found.difference.low, found.difference.value, found.difference.high))
    numbers = f"BLEU, {split}: {first} − {second} = {value} [{low}, {high}], n = {len(pairs):,}"
    return _Comparison(
        first=first,
        second=second,
        numbers=f"{numbers}, {_p_text(found.p_value)}",
        difference=found.difference,
        p_value=found.p_value,
        detail=signatures[0] or "",
    )


def _compare_exactly(
    split: str, first: str, second: str, pairs: list[tuple[ScoredSample, ScoredSample]]
) -> _Comparison:
    correct_E2 = np.array([(a.correct, b.correct) for a, b in pairs], bool)
    compared = compare_paired(correct_E2[:, 0], correct_E2[:, 1])
    interval = compared.difference
    low, value, high = (_signed(100 * x) for x in (interval.low, interval.value, interval.high))
    numbers = f"Exact match, {split}: {first} − {second} = {value} points [{low}, {high}], n = {compared.examples:,}"
    return _Comparison(
        first=first,
        second=second,
        numbers=f"{numbers}, {_p_text(compared.p_value)}",
        difference=interval,
        p_value=compared.p_value,
        detail=(
            f"both right {compared.both:,}, only {first} {compared.only_first:,}, "
            f"only {second} {compared.only_second:,}, both wrong {compared.neither:,}"
        ),
    )


def _signed(x: float) -> str:
    """
    >>> _signed(-1.26), _signed(0.03)
    ('−1.3', '+0.03')
    """
    digits = 1 if abs(x) >= 0.05 or x == 0 else 2
    return f"{x:+.{digits}f}".replace("-", "−")


def _p_text(p_value: float) -> str:
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"
