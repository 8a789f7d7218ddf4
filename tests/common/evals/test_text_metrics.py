"""Scores equal sacrebleu's, intervals are those of a real resampling."""

import time

import numpy as np
import pytest
import sacrebleu

from common.analysis.statistics import wilson
from common.errors import UserError
from common.evals.text_metrics import _bleu, _sentence_statistics, bleu_difference, corpus_bleu, score_texts

WORDS = "der die das Tag Jahr vor in Stunden, Euro 3,5 12.04.2020 (Serbien) — Mio. nächste".split()


def corpus(examples: int, seed: int = 0) -> tuple[list[str], list[str]]:
    generator = np.random.default_rng(seed)
    references = [" ".join(generator.choice(WORDS, size=generator.integers(1, 12))) for _ in range(examples)]
    predictions = [r if generator.random() < 0.7 else " ".join([*r.split()[1:], "das"]) for r in references]
    return predictions, references


@pytest.mark.parametrize(
    ("predictions", "references"),
    [
        corpus(300),
        (["", "a b c d e"], ["x", "a b c d e"]),
        ([""], ["a b c d"]),
        (["a", ""], ["", "a b c d"]),
        (["ganz anders"], ["nichts davon hier drin"]),
        (["12.04.2020 & <b>"], ["12.04.2020 &amp; <b>"]),
    ],
)
def test_bleu_is_sacrebleus(predictions: list[str], references: list[str]) -> None:
    interval = corpus_bleu(predictions, references, resamples=20)
    assert interval is not None
    assert interval.value == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score, abs=1e-9)


def test_texts_too_short_for_bleu_have_none() -> None:
    assert sacrebleu.corpus_bleu(["Provinz Rom"], [["Provinz Rom"]]).score == 0  # though it is perfect
    assert corpus_bleu(["Provinz Rom"], ["Provinz Rom"]) is None


def test_a_resample_is_scored_as_the_texts_drawn() -> None:
    predictions, references = corpus(50)
    statistics = _sentence_statistics(predictions, references)
    for seed in range(5):
        drawn = np.random.default_rng(seed).integers(50, size=50)
        want = sacrebleu.corpus_bleu([predictions[i] for i in drawn], [[references[i] for i in drawn]]).score
        assert _bleu(np.bincount(drawn, minlength=50) @ statistics) == pytest.approx(want, abs=1e-9)


def test_bleu_interval_surrounds_the_score_and_narrows_as_examples_grow() -> None:
    few, many = corpus_bleu(*corpus(100)), corpus_bleu(*corpus(1600))
    assert few is not None and many is not None
    assert few.low < few.value < few.high and many.low < many.value < many.high
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.3)
    assert corpus_bleu(*corpus(100)) == few


def test_a_difference_of_bleu_is_of_the_same_sentences() -> None:
    better, references = corpus(300)
    worse = [" ".join(text.split()[:-1]) for text in better]
    found = bleu_difference(better, worse, references, resamples=5)

    def difference(drawn: np.ndarray) -> float:
        one, other = (
            sacrebleu.corpus_bleu([texts[i] for i in drawn], [[references[i] for i in drawn]]).score
            for texts in (better, worse)
        )
        return one - other

    generator = np.random.default_rng(0)
    resampled = [difference(generator.integers(300, size=300)) for _ in range(5)]
    assert found.value == pytest.approx(difference(np.arange(300)))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])))
    same = bleu_difference(better, better, references)
    assert (same.low, same.value, same.high) == (0.0, 0.0, 0.0)


def test_four_thousand_sentences_are_scored_quickly() -> None:
    predictions, references = corpus(4000)
    corpus_bleu(predictions[:2], references[:2], resamples=1)  # imports
    start = time.process_time()
    corpus_bleu(predictions, references)
    assert time.process_time() - start < 4  # twice the aim: other work may share the core


def test_groups_partition_the_examples() -> None:
    predictions, references = corpus(100)
    groups = ["dates" if i % 3 else "units" for i in range(100)]
    whole, dates, units = score_texts(predictions, references, groups, "test")
    assert (whole.group, dates.group, units.group) == ("all", "dates", "units")
    assert {s.split for s in (whole, dates, units)} == {"test"}
    assert dates.examples + units.examples == whole.examples == 100
    correct = [round(s.exact_match.value * s.examples) for s in (whole, dates, units)]
    assert correct[1] + correct[2] == correct[0] == sum(p == r for p, r in zip(predictions, references, strict=True))
    assert dates.exact_match == wilson(correct[1], dates.examples)
    assert whole.bleu is not None and dates.bleu is None and units.bleu is None


def test_copying_the_inputs_is_scored_beside() -> None:
    references = ["the cat sat on the mat", "a dog ran over the road"]
    inputs = ["the cat sat on a chair", "ein Hund lief"]
    (score,) = score_texts(references, references, None, "test", inputs=inputs)
    assert score.bleu is not None and score.bleu.value == pytest.approx(100.0)
    assert score.copied_bleu == pytest.approx(sacrebleu.corpus_bleu(inputs, [references]).score)


def test_exact_match_is_exact() -> None:
    (score,) = score_texts(["5\u00a0€", "Tag ", "Tag"], ["5 €", "Tag", "Tag"], None, "test")
    assert score.exact_match.value == pytest.approx(1 / 3)


def test_a_group_called_all_is_refused() -> None:
    with pytest.raises(UserError, match="'all'"):
        score_texts(["a"], ["a"], ["all"], "test")
