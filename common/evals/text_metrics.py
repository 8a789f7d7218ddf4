"""Scores decoded text against its references by exact match and BLEU.

Legend: E examples.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from common.analysis.statistics import wilson
from common.errors import UserError
from common.evals.bleu import bleu_of, corpus_bleu, sentence_statistics, signature, tokenizer_for
from common.evals.measure import InTraining, TextScore

ALL = "all"
"""The group that holds every example of a split."""


def score_texts(
    predictions: Sequence[str],
    references: Sequence[str],
    groups: Sequence[str] | None,
    split: str,
    *,
    inputs: Sequence[str] | None = None,
    in_training: InTraining | None = None,
    seed: int = 0,
) -> tuple[TextScore, ...]:
    """Returns scores for the whole split ("all") and then, if `groups` has each example's kind, for each kind by name.

    Exact match compares strings without normalisation. Only "all" has BLEU, which is a statistic of a corpus: a kind of
    phrases of two or three words has hardly any 4-grams, so its BLEU would mostly be smoothing. BLEU splits words by
    the references' language. With `inputs`, the BLEU of the inputs themselves is measured too.
    Raises `UserError` if a kind is called "all".

    >>> [(s.group, s.examples, s.exact_match.value) for s in score_texts(["a", "b"], ["a", "c"], ["x", "x"], "test")]
    [('all', 2, 0.5), ('x', 2, 0.5)]
    """
    assert len(predictions) == len(references) > 0, (len(predictions), len(references))
    assert groups is None or len(groups) == len(references)
    check_groups(groups or [], split)
    correct_E = np.array(
        [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
    )
    tokenizer = tokenizer_for(references)
    bleu = corpus_bleu(predictions, references, tokenizer, seed=seed)
    scores = [
        TextScore(
            split=split,
            group=ALL,
            examples=len(correct_E),
            exact_match=wilson(int(correct_E.sum()), len(correct_E)),
            bleu=bleu,
            in_training=in_training,
            bleu_signature=None if bleu is None else signature(tokenizer),
            copied_bleu=None if inputs is None else _copying_score(inputs, references, tokenizer),
        )
    ]
    groups_E = np.array(groups if groups is not None else [], dtype=object)
    for group in sorted(set(groups_E)):
        members = correct_E[groups_E == group]
        share = wilson(int(members.sum()), len(members))
        scores.append(TextScore(split=split, group=group, examples=len(members), exact_match=share, bleu=None))
    return tuple(scores)


def _copying_score(inputs: Sequence[str], references: Sequence[str], tokenizer: str) -> float:
    return float(bleu_of(sentence_statistics(inputs, references, tokenizer).sum(axis=0, keepdims=True))[0])


def check_groups(groups: Iterable[str | None], split: str) -> None:
    """Raises UserError if a group is called "all"."""
    if ALL in groups:
        raise UserError(
            f"split {split!r}: a group may not be called {ALL!r}, which stands for the whole split; nearest: call it "
            "otherwise in the data, or name no field as the source's group"
        )
