"""Compares scores with sacrebleu's, and intervals with those of texts actually resampled."""

import time

import numpy as np
import pytest
import sacrebleu

from common.analysis.statistics import wilson
from common.errors import UserError
from common.evals.bleu import bleu_of, compare_bleu, corpus_bleu, sentence_statistics, signature, tokenizer_for
from common.evals.text_metrics import score_texts

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
        (["a b", "c d e f"], ["a c b d", "c d f e"]),
        (["der a b c"], ["der d e f"]),
    ],
)
def test_bleu_equals_sacrebleus(predictions: list[str], references: list[str]) -> None:
    interval = corpus_bleu(predictions, references, "13a", resamples=20)
    assert interval is not None
    assert interval.value == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score, abs=1e-9)


def test_texts_too_short_for_bleu_have_none() -> None:
    assert sacrebleu.corpus_bleu(["Provinz Rom"], [["Provinz Rom"]]).score == 0  # although it is perfect
    assert corpus_bleu(["Provinz Rom"], ["Provinz Rom"], "13a") is None


def test_a_resample_scores_as_the_drawn_texts() -> None:
    predictions, references = corpus(50)
    statistics = sentence_statistics(predictions, references, "13a")
    for seed in range(5):
        drawn = np.random.default_rng(seed).integers(50, size=50)
        want = sacrebleu.corpus_bleu([predictions[i] for i in drawn], [[references[i] for i in drawn]]).score
        assert bleu_of(np.bincount(drawn, minlength=50)[None] @ statistics)[0] == pytest.approx(want, abs=1e-9)


def test_bleu_interval_contains_the_score_and_narrows_with_more_examples() -> None:
    few, many = corpus_bleu(*corpus(100), "13a"), corpus_bleu(*corpus(1600), "13a")
    assert few is not None and many is not None
    assert few.low < few.value < few.high and many.low < many.value < many.high
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.3)
    assert corpus_bleu(*corpus(100), "13a") == few


def test_a_bleu_difference_resamples_the_same_sentences_for_both() -> None:
    better, references = corpus(300)
    worse = [" ".join(text.split()[:-1]) for text in better]
    found = compare_bleu(better, worse, references, "13a", resamples=5).difference

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
    same = compare_bleu(better, better, references, "13a")
    assert (same.difference.low, same.difference.value, same.difference.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("sentences", [5, 20])
def test_equal_systems_rarely_differ_by_the_bleu_test(sentences: int) -> None:
    """With 5 sentences, the bootstrap interval alone excludes 0 far too often."""
    generator, trials, intervals, tests = np.random.default_rng(1), 150, 0, 0
    for _ in range(trials):
        references = [generator.choice(WORDS, size=8).tolist() for _ in range(sentences)]
        one, other = (
            [" ".join(w if generator.random() < 0.8 else "?" for w in reference) for reference in references]
            for _ in range(2)
        )
        found = compare_bleu(one, other, [" ".join(r) for r in references], "13a", resamples=200)
        intervals += not found.difference.low <= 0 <= found.difference.high
        tests += found.p_value < 0.05
    assert tests / trials <= 0.08
    assert sentences > 5 or (intervals / trials > 0.09 and tests == 0)


def test_the_bleu_test_finds_a_clear_difference() -> None:
    better, references = corpus(40)
    worse = [" ".join(text.split()[:-1]) for text in better]
    assert compare_bleu(better, worse, references, "13a").p_value < 0.01
    few = compare_bleu(better[:8], worse[:8], references[:8], "13a")  # all 256 ways to swap
    assert few.p_value * 256 == pytest.approx(round(few.p_value * 256))


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("Der Rat von 東京 tagt heute wieder", "13a"),
        ("한국어는 낱말 사이를 띄어 쓴다", "13a"),
        ("猫坐在垫子上,狗在花园里 and a TPU", "zh"),
        ("猫がマットの上に座っている。", "char"),
        ("カタカナ", "char"),
        ("แมวนั่งอยู่บนเสื่อ", "char"),
        ("12.5 %", "13a"),
        ("", "13a"),
    ],
)
def test_languages_without_spaces_have_their_own_tokenizers(
    text: str, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.evals.bleu.has_mecab", lambda: False)
    assert tokenizer_for([text, ""]) == tokenizer
    assert f"|tok:{tokenizer}|" in signature(tokenizer)
    monkeypatch.setattr("common.evals.bleu.has_mecab", lambda: True)
    assert tokenizer_for([text, ""]) == ("ja-mecab" if "カ" in text or "が" in text else tokenizer)


def test_chinese_is_scored_with_sacrebleus_chinese_tokenizer() -> None:
    predictions, references = ["猫坐在垫子上面。", "狗在花园里跑。"], ["猫坐在垫子上。", "狗在花园里走。"]
    (score,) = score_texts(predictions, references, None, "test", inputs=references)
    assert score.bleu is not None and score.bleu_signature == signature("zh")
    assert score.bleu.value == pytest.approx(sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score)
    assert score.copied_bleu == pytest.approx(100.0)


def test_four_thousand_sentences_are_scored_quickly() -> None:
    predictions, references = corpus(4000)
    corpus_bleu(predictions[:2], references[:2], "13a", resamples=1)  # imports
    start = time.process_time()
    corpus_bleu(predictions, references, "13a")
    assert time.process_time() - start < 4  # twice the target, since other work may share the core


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


def test_the_inputs_are_scored_as_well() -> None:
    references = ["the cat sat on the mat", "a dog ran over the road"]
    inputs = ["the cat sat on a chair", "ein Hund lief"]
    (score,) = score_texts(references, references, None, "test", inputs=inputs)
    assert score.bleu is not None and score.bleu.value == pytest.approx(100.0)
    assert score.copied_bleu == pytest.approx(sacrebleu.corpus_bleu(inputs, [references]).score)


def test_exact_match_does_not_normalise() -> None:
    (score,) = score_texts(["5\u00a0€", "Tag ", "Tag"], ["5 €", "Tag", "Tag"], None, "test")
    assert score.exact_match.value == pytest.approx(1 / 3)


def test_a_group_called_all_raises() -> None:
    with pytest.raises(UserError, match="'all'"):
        score_texts(["a"], ["a"], ["all"], "test")
