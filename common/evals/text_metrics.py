"""Decoded text against its references: exact match and BLEU.

Legend: E examples, R resamples, S the ten sums that BLEU is made of.
"""

from collections.abc import Sequence

import numpy as np

from common.analysis.statistics import percentile_interval, wilson
from common.errors import UserError
from common.report.results import Interval, TextScore

ALL = "all"
"""The group that holds every example of a split."""


def score_texts(
    predictions: Sequence[str],
    references: Sequence[str],
    groups: Sequence[str] | None,
    split: str,
    *,
    inputs: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[TextScore, ...]:
    """Scores for the whole split ("all", first) and, where `groups` names each example's kind, for each kind by name.

    Exact match compares strings as they are, with no normalisation. BLEU is for "all" only: it is a statistic of a
    corpus, and a kind of phrase of two or three words has hardly any 4-grams, so its BLEU would be smoothing. Where
    `inputs` are given, theirs stands beside it.
    Raises `UserError` where a kind is itself called "all".

    >>> [(s.group, s.examples, s.exact_match.value) for s in score_texts(["a", "b"], ["a", "c"], ["x", "x"], "test")]
    [('all', 2, 0.5), ('x', 2, 0.5)]
    """
    assert len(predictions) == len(references) > 0, (len(predictions), len(references))
    assert groups is None or len(groups) == len(references)
    if groups is not None and ALL in groups:
        raise UserError(f"split {split!r}: a group may not be called {ALL!r}, which stands for the whole split")
    correct_E = np.array(
        [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
    )
    scores = [
        TextScore(
            split=split,
            group=ALL,
            examples=len(correct_E),
            exact_match=wilson(int(correct_E.sum()), len(correct_E)),
            bleu=corpus_bleu(predictions, references, seed=seed),
            copied_bleu=None if inputs is None else _bleu(_sentence_statistics(inputs, references).sum(axis=0)),
        )
    ]
    groups_E = np.array(groups if groups is not None else [], dtype=object)
    for group in sorted(set(groups_E)):
        members = correct_E[groups_E == group]
        share = wilson(int(members.sum()), len(members))
        scores.append(TextScore(split=split, group=group, examples=len(members), exact_match=share, bleu=None))
    return tuple(scores)


def corpus_bleu(
    predictions: Sequence[str], references: Sequence[str], *, seed: int = 0, resamples: int = 1000
) -> Interval | None:
    """sacrebleu's corpus BLEU (13a tokens, "exp" smoothing; 0..100) with a bootstrap interval over sentences.

    None where no reference is four tokens long: sacrebleu calls even a perfect translation of such texts 0.
    Corpus BLEU is a function of ten sums over sentences, so a resample (Koehn 2004, W04-3250) only re-weighs them.
    """
    statistics_ES = _sentence_statistics(predictions, references)
    examples, ref_lengths_E = len(statistics_ES), statistics_ES[:, 1]
    if ref_lengths_E.max() < 4:
        return None
    generator = np.random.default_rng(seed)
    resampled_R = np.empty(resamples)
    for r in range(resamples):
        drawn_E = np.bincount(generator.integers(examples, size=examples), minlength=examples)
        resampled_R[r] = _bleu(drawn_E @ statistics_ES)
    return percentile_interval(_bleu(statistics_ES.sum(axis=0)), resampled_R)


def bleu_difference(
    first: Sequence[str], second: Sequence[str], references: Sequence[str], *, seed: int = 0, resamples: int = 1000
) -> Interval:
    """Corpus BLEU of the first system less that of the second, with the interval of a paired bootstrap: every resample
    draws the same sentences for both (Koehn 2004)."""
    sides = [_sentence_statistics(predictions, references) for predictions in (first, second)]
    generator, examples = np.random.default_rng(seed), len(references)
    resampled_R = np.empty(resamples)
    for r in range(resamples):
        drawn_E = np.bincount(generator.integers(examples, size=examples), minlength=examples)
        one, other = (_bleu(drawn_E @ statistics_ES) for statistics_ES in sides)
        resampled_R[r] = one - other
    one, other = (_bleu(statistics_ES.sum(axis=0)) for statistics_ES in sides)
    return percentile_interval(one - other, resampled_R)


def _sentence_statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """int64 [E, 10]: prediction length, reference length, matching n-grams of order 1 to 4, n-grams of order 1 to 4."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(effective_order=True)  # only silences a warning about sentence scores, which are not used
    scores = [metric.sentence_score(p, [r]) for p, r in zip(predictions, references, strict=True)]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], np.int64)


def _bleu(sums_S: np.ndarray) -> float:
    from sacrebleu.metrics import BLEU

    sys_len, ref_len, *ngrams = (int(x) for x in sums_S)
    return BLEU.compute_bleu(
        correct=ngrams[:4], total=ngrams[4:], sys_len=sys_len, ref_len=ref_len, smooth_method="exp"
    ).score
