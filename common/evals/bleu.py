"""Corpus BLEU (0..100), as sacrebleu computes it, with bootstrap intervals and a paired test.

Corpus BLEU is a function of ten sums over sentences, so a resample is one product of sentence counts [E] with the
sentences' ten statistics [E, 10]. `scipy.stats.bootstrap` would copy all statistics for every resample, and importing
it takes longer than scoring a small run.

Legend: E examples, R resamples, M ways to swap outputs, S the ten sums.
"""

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from common.analysis.interval import Interval
from common.analysis.statistics import percentile_interval

WESTERN, JAPANESE = "13a", "ja-mecab"
CHARACTERS = "char"
"""sacrebleu's tokenizer for scripts that it cannot split into words, and for Japanese without MeCab."""
_TOKENIZER_OF_SCRIPT = {
    "CJK": "zh",
    "HIRAGANA": JAPANESE,
    "KATAKANA": JAPANESE,
    **dict.fromkeys(("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN"), CHARACTERS),
}
"""The tokenizers of scripts without spaces between words, by the first word of their letters' Unicode names."""
WITHOUT_SPACES = 0.25
"""A text counts as one without spaces if more than this share of its letters is; names in a Western text are fewer."""
KANA = 0.05
"""A text counts as Japanese from this share of kana among its kana and Chinese characters."""
EXACT_SWAPS = 12
"""Up to this many sentences, the test tries every way to swap two systems' outputs."""


def tokenizer_for(references: Iterable[str]) -> str:
    """Returns the name of sacrebleu's tokenizer for the language of `references`, judged by their script.

    >>> tokenizer_for(["Provinz Rom"]), tokenizer_for(["猫坐在垫子上。"]), tokenizer_for(["แมวนั่งบนเสื่อ"])
    ('13a', 'zh', 'char')
    """
    letters: Counter[str] = Counter()
    for sign, count in Counter(sign for text in references for sign in text if sign.isalpha()).items():
        letters[unicodedata.name(sign, "").split(" ")[0]] += count
    found: Counter[str] = Counter()
    for script, count in letters.items():
        found[_TOKENIZER_OF_SCRIPT.get(script, WESTERN)] += count
    if not found or found[WESTERN] > (1 - WITHOUT_SPACES) * found.total():
        return WESTERN
    if found[CHARACTERS] > found["zh"] + found[JAPANESE]:
        return CHARACTERS
    if found[JAPANESE] < KANA * (found["zh"] + found[JAPANESE]):
        return "zh"
    return JAPANESE if has_mecab() else CHARACTERS


def has_mecab() -> bool:
    """Returns whether sacrebleu can split Japanese into words (`pip install "sacrebleu[ja]"`)."""
    try:
        import ipadic  # type: ignore[import-not-found]  # noqa: F401
        import MeCab  # type: ignore[import-not-found]  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return True


def signature(tokenizer: str) -> str:
    """Returns sacrebleu's description of how a score is computed.

    >>> signature("13a").split("version")[0]
    'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|'
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenizer)
    metric.num_refs = 1
    return str(metric.get_signature().format())


def tokenizer_in(signature: str | None) -> str:
    """Returns the tokenizer that a signature names; scores without a signature were computed with "13a".

    >>> tokenizer_in("nrefs:1|tok:zh|smooth:exp"), tokenizer_in("nrefs:1|tok:ja-mecab-0.996-IPA"), tokenizer_in(None)
    ('zh', 'ja-mecab', '13a')
    """
    named = re.search(r"(?:^|\|)tok:([^|]+)", signature or "")
    name = named[1] if named else WESTERN
    return JAPANESE if name.startswith(JAPANESE) else name  # followed by MeCab's version and dictionary


def sentence_statistics(predictions: Sequence[str], references: Sequence[str], tokenizer: str) -> np.ndarray:
    """Returns int64 [E, 10]: prediction length, reference length, matching 1- to 4-grams, all 1- to 4-grams."""
    from sacrebleu.metrics import BLEU

    # `effective_order` only silences a warning about sentence scores, which are not used here.
    metric = BLEU(tokenize=tokenizer, effective_order=True)
    scores = [metric.sentence_score(p, [r]) for p, r in zip(predictions, references, strict=True)]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], np.int64)


def bleu_of(sums_RS: np.ndarray) -> np.ndarray:
    """Computes BLEU from sums, as sacrebleu's `compute_bleu` with "exp" smoothing; float64 [R]."""
    sys_len_R, ref_len_R, correct_R4, total_R4 = sums_RS[:, 0], sums_RS[:, 1], sums_RS[:, 2:6], sums_RS[:, 6:10]
    # The k-th order without a match counts as 1 / 2^k matches. Orders without n-grams have precision 0.
    halvings_R4 = np.cumsum(correct_R4 == 0, axis=1)
    matches_R4 = np.where(correct_R4 > 0, correct_R4, 0.5**halvings_R4)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision_R4 = np.where(total_R4 > 0, matches_R4 / total_R4, 0.0)
        brevity_R = np.minimum(0.0, np.where(sys_len_R > 0, 1 - ref_len_R / sys_len_R, -np.inf))
        score_R = 100 * np.exp(brevity_R + np.log(precision_R4).mean(axis=1))
    return np.where(correct_R4.any(axis=1), score_R, 0.0)


def corpus_bleu(
    predictions: Sequence[str], references: Sequence[str], tokenizer: str, *, seed: int = 0, resamples: int = 1000
) -> Interval | None:
    """Returns corpus BLEU with a bootstrap interval over sentences (Koehn 2004, W04-3250).

    Returns None if no reference has four tokens: sacrebleu gives 0 even to a perfect translation of such texts.
    """
    statistics_ES = sentence_statistics(predictions, references, tokenizer)
    if statistics_ES[:, 1].max() < 4:
        return None
    return percentile_interval(_corpus_score(statistics_ES), bleu_of(_resampled_sums(statistics_ES, seed, resamples)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BleuComparison:
    """A comparison of two systems' outputs for the same sentences."""

    difference: Interval
    """BLEU of the first system minus that of the second, with its paired bootstrap interval (Koehn 2004)."""
    p_value: float
    """p-value of approximate randomisation (Riezler & Maxwell 2005, W05-0908): how often a difference is as large when
    outputs are swapped at random, sentence by sentence. Unlike the bootstrap, it keeps its level with few sentences."""


def compare_bleu(
    first: Sequence[str],
    second: Sequence[str],
    references: Sequence[str],
    tokenizer: str,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> BleuComparison:
    """Compares two systems; every resample draws the same sentences for both."""
    one_ES, other_ES = (sentence_statistics(predictions, references, tokenizer) for predictions in (first, second))
    value = _corpus_score(one_ES) - _corpus_score(other_ES)
    drawn_R = bleu_of(_resampled_sums(one_ES, seed, resamples)) - bleu_of(_resampled_sums(other_ES, seed, resamples))
    swaps_ME = _swaps(len(references), seed, 2 * resamples)
    change_MS = swaps_ME @ (other_ES - one_ES)
    swapped_M = bleu_of(one_ES.sum(axis=0) + change_MS) - bleu_of(other_ES.sum(axis=0) - change_MS)
    as_large = int((np.abs(swapped_M) >= abs(value) - 1e-9).sum())
    # All ways to swap include the observed one; random ones need it added.
    p_value = as_large / len(swaps_ME) if len(references) <= EXACT_SWAPS else (as_large + 1) / (len(swaps_ME) + 1)
    return BleuComparison(difference=percentile_interval(value, drawn_R), p_value=p_value)


def _corpus_score(statistics_ES: np.ndarray) -> float:
    return float(bleu_of(statistics_ES.sum(axis=0, keepdims=True))[0])


def _resampled_sums(statistics_ES: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """Sums the statistics of sentences drawn with replacement; a seed draws the same for every system; int64 [R, S]."""
    generator, examples = np.random.default_rng(seed), len(statistics_ES)
    sums_RS = np.empty((resamples, statistics_ES.shape[1]), np.int64)
    for row_S in sums_RS:
        row_S[:] = np.bincount(generator.integers(examples, size=examples), minlength=examples) @ statistics_ES
    return sums_RS


def _swaps(examples: int, seed: int, count: int) -> np.ndarray:
    """Returns which outputs are swapped in each way: all ways if they are few, else `count` random; int8 [M, E]."""
    if examples <= EXACT_SWAPS:
        return (np.arange(2**examples)[:, None] >> np.arange(examples) & 1).astype(np.int8)
    return np.random.default_rng(seed).integers(2, size=(count, examples), dtype=np.int8)
