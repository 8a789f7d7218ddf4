"""States in sentences what a study shows and what it does not."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from common.analysis.interval import Interval
from common.analysis.statistics import CONFIDENCE, compare_paired, holm
from common.report.examples import PairedExample, pair_examples
from common.report.findings import Findings, headline
from common.report.run_files import ScoredSample, StudyRuns
from common.report.tables import find_score, splits
from common.report.units import p_text, scientific, si

MOST_FINDINGS = 6
"""Most comparisons over seeds that are spelled out; a table has all."""
MOST_LISTED = 12
"""Most names or reasons in a sentence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A sentence, and the counts that support it ("" if there are none)."""

    text: str
    detail: str = ""


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


def verdicts(study: StudyRuns, findings: Findings) -> tuple[Verdict, ...]:
    """States what was found, then remarks on the whole study.

    With one seed an arm, statements on the trained models and their answers, and why none holds for the arms; with
    more, every comparison over seeds. The remarks: the number of comparisons, test texts found in the training data,
    runs without a result, and validation loss.
    """
    lines = _over_seeds(findings) if study.seeds > 1 else _of_one_seed(study, findings)
    lines += [Verdict(text=f"{line}.") for line in in_training(study)]
    if study.unfinished:
        lines.append(Verdict(text=f"Not in this report, because they have no result: {_listed(study.unfinished)}."))
    if study.seeds > 1:
        return tuple(lines)
    losses = ", ".join(f"{r.arm} {r.validation_loss:.4f}" for r in study.results)
    return (*lines, Verdict(text=f"Validation loss: {losses} nats per token."))


def _over_seeds(findings: Findings) -> list[Verdict]:
    found = findings.found
    resolved = sum(finding.resolution.resolved for finding in found)
    counted = f"{resolved} of {len(found)} comparison{'s' * (len(found) > 1)} over seeds resolved"
    correction = "; p-values are corrected for their number (Holm)" if len(found) > 1 else ""
    lines = [Verdict(text=f"{counted}{correction}.")] if found else []
    lines += [Verdict(text=text) for text in findings.uncompared]
    first = sorted(found, key=lambda finding: not finding.resolution.resolved)[:MOST_FINDINGS]
    lines += [Verdict(text=finding.sentence, detail=finding.detail) for finding in first]
    if len(found) > MOST_FINDINGS:
        lines.append(Verdict(text=f"{len(found) - MOST_FINDINGS} more are in the table of comparisons."))
    return lines


def _of_one_seed(study: StudyRuns, findings: Findings) -> list[Verdict]:
    examples = pair_examples(study.first_seed)
    compared = [
        result
        for split in splits(study.results)
        for other in range(1, len(study.first_seed))
        for result in _compare(study, examples, split, other)
    ]
    tests = [result for result in compared if isinstance(result, _Comparison)]
    corrected = iter(holm([test.p_value for test in tests]))
    lines = [
        _statement(result, next(corrected), len(tests), study) if isinstance(result, _Comparison) else result
        for result in compared
    ]
    if tests:
        lines.append(Verdict(text=_tests_sentence(len(tests))))
    if reasons := list(dict.fromkeys(reason for f in findings.found for reason in f.resolution.reasons)):
        lines.append(Verdict(text=f"No difference between the arms is resolved: {_listed(reasons, '; ')}."))
    return lines


def _listed(items: Sequence[str], between: str = ", ") -> str:
    more = [f"and {len(items) - MOST_LISTED} more"] if len(items) > MOST_LISTED else []
    return between.join([*items[:MOST_LISTED], *more])


def in_training(study: StudyRuns) -> list[str]:
    """Returns one sentence per split on how many of its texts are in the training data; arms that agree share it."""
    counts = [(s.split, s.in_training) for r in study.results for s in r.scores if s.in_training is not None]
    return list(dict.fromkeys(known.sentence(split) for split, known in counts))


def _tests_sentence(tests: int) -> str:
    if tests == 1:
        return "This report makes 1 comparison."
    return (
        f"This report makes {tests} comparisons: by chance alone, one in 20 would look like a difference, so verdicts "
        f"use p-values corrected for {tests} comparisons (Holm)."
    )


def _statement(test: _Comparison, corrected: float, tests: int, study: StudyRuns) -> Verdict:
    """States which of two trained models is better on these examples, if one is; says nothing of their arms.

    One is if the interval over examples excludes 0 and the corrected p-value is below 0.05. Both are required: the
    bootstrap interval is too narrow with few sentences, and a p-value alone does not show how small a difference is.
    """
    numbers = test.numbers + (f" ({p_text(corrected)} corrected for {tests} comparisons)" if tests > 1 else "")
    outside = test.difference.low > 0 or test.difference.high < 0
    if not outside or corrected >= 1 - CONFIDENCE:
        return Verdict(text=f"{numbers}: no difference resolved.", detail=test.detail)
    better, worse = (test.first, test.second)[:: 1 if test.difference.value > 0 else -1]
    verdict = (
        f"the {better} model trained here{_seeds(study)} is better on these examples than the {worse} model; one seed "
        f"says nothing about {better} and {worse} in general"
    )
    return Verdict(text=f"{numbers}: {verdict}.", detail=test.detail)


def _seeds(study: StudyRuns) -> str:
    """Names the seeds of the first arm; all arms of a comparison share them."""
    config = study.first_seed[0].config
    seeds = {name: config.get(name, {}).get("seed") for name in ("train", "data")}
    known = ", ".join(f"{name}.seed {seed}" for name, seed in seeds.items() if seed is not None)
    return f" ({known})" if known else ""


def caveat(study: StudyRuns) -> str:
    """Returns what no interval in this report covers, and what the intervals are."""
    largest = max(study.results, key=lambda result: result.parameters)
    once = "Each arm was trained once: the intervals cover the choice of examples, not other seeds or data orders."
    several = "The intervals of differences cover other seeds and data orders, not other settings."
    return (
        f"{several if study.seeds > 1 else once} "
        f"Results at this size ({si(largest.parameters)} parameters, {scientific(largest.flops.full_attention, 2)} "
        "training FLOPs per arm) say nothing about larger models."
    )


def _compare(
    study: StudyRuns, examples: tuple[PairedExample, ...], split: str, other: int
) -> list[_Comparison | Verdict]:
    """Compares by exact match and, if both arms have one, by BLEU; the study's headline metric comes first."""
    first, second = study.first_seed[0], study.first_seed[other]
    pairs = [
        (a, b)
        for example in examples
        if example.split == split and (a := example.answers[0]) and (b := example.answers[other])
    ]
    scores = [find_score(run.result, split, "all") for run in (first, second)]
    scored = {score.examples if score else 0 for score in scores}
    if scored == {len(pairs)} == {0}:  # only other arms were scored on this split
        return []
    if scored != {len(pairs)}:
        # samples.jsonl may hold a part of the split, such as errors only, which must not count as the whole.
        text = f"Exact match, {split}: {first.arm} and {second.arm} are not compared example by example"
        counts = " and ".join(f"{n:,}" for n in sorted(scored))
        return [Verdict(text=f"{text}: samples.jsonl pairs {len(pairs):,} of {counts} examples.")]
    exact = _compare_exactly(split, first.arm, second.arm, pairs)
    bleus = [score.bleu_signature for score in scores if score and score.bleu]
    if len(bleus) < 2:
        return [exact]
    bleu = _compare_bleu(split, first.arm, second.arm, pairs, bleus)
    return [bleu, exact] if headline(study) == "bleu" else [exact, bleu]


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
        numbers=f"{numbers}, {p_text(found.p_value)}",
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
        numbers=f"{numbers}, {p_text(compared.p_value)}",
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
