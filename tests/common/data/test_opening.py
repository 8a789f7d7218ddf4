"""Opening what a config describes: tokenizers with modes and sentinels, shared tokens, and refused configs."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.config import BytePairConfig, SentencePieceConfig
from common.data.loader import Loader
from common.data.objectives.config import (
    UL2,
    UL2R,
    BertStyle,
    FullLM,
    Objective,
    PrefixLM,
    SpanCorruption,
    Supervised,
    raw_parts,
)
from common.data.sources.config import ByRate, BySize, SourceMixture, Stage, Template
from common.data.streams import (
    Host,
    open_tokenizer_of,
    open_training,
    open_training_text,
)
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.errors import UserError
from tests.common.data.stream_configs import LINES, config_of, mixture, text


def test_ul2_uses_its_modes_at_their_rates(folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    config = config_of(text(folder), UL2())
    loader = open_training(config, tokenizer, tmp_path, Host())
    names = {part.mode: tokenizer.encode(part.mode).tolist() for part in raw_parts(UL2())}
    assert isinstance(loader, Loader)
    seen: Counter[str] = Counter()
    for made in loader._examples.make(np.arange(1000)):
        inputs = made.inputs_I.tolist()
        seen[next(mode for mode, ids in names.items() if inputs[: len(ids)] == ids)] += 1
    for mode, rate in (("[NLU]", 0.33), ("[S2S]", 0.34), ("[NLG]", 0.33)):
        assert abs(seen[mode] - 1000 * rate) < 6


@pytest.mark.parametrize("objective", [UL2(), UL2R()], ids=["ul2", "ul2r"])
@pytest.mark.parametrize(
    "how",
    [SentencePieceConfig(vocab_size=300, sentinels=20, model_type="bpe"), BytePairConfig(vocab_size=300, sentinels=20)],
)
def test_a_mode_is_one_token_of_a_trained_tokenizer(
    folder: Path, tmp_path: Path, objective: Objective, how: SentencePieceConfig | BytePairConfig
) -> None:
    config = dataclasses.replace(config_of(text(folder), objective), tokenizer=how)
    source = open_training_text(config, tmp_path)
    trained = open_tokenizer_of(config, source, tmp_path)
    assert sorted(trained.modes.values()) == [3, 4, 5] and trained.vocab_size == 300
    loader = open_training(config, trained, tmp_path, Host())
    assert isinstance(loader, Loader)
    plain = open_tokenizer_of(dataclasses.replace(config, objective=SpanCorruption()), source, tmp_path)
    assert plain.modes == {} and plain.content_hash != trained.content_hash
    for made in loader._examples.make(np.arange(50)):
        assert 3 <= made.inputs_I[0] <= 5 and not np.isin([*made.inputs_I[1:], *made.targets_T], [3, 4, 5]).any()
    for mode, token in trained.modes.items():
        assert not np.isin(trained.encode(f"{mode} 1 is"), [3, 4, 5]).any(), "modes inside texts are ordinary text"
        assert trained.decode(trained.encode(f"{mode} 1 is")) == f"{mode} 1 is"
        prompt = trained.encode_with_sentinels(f"{mode} 1 is <extra_id_0> less").tolist()
        assert prompt == [token, *trained.encode_with_sentinels("1 is <extra_id_0> less")]
    assert not np.isin(trained.ordinary_ids, [0, 1, 2, 3, 4, 5]).any()


def test_random_tokens_of_bert_style_are_ordinary_ids(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    """They are neither special ids nor sentinels, and cover all other ids."""
    loader = open_training(config_of(text(folder), BertStyle(random_share=1.0)), tokenizer, tmp_path, Host())
    assert isinstance(loader, Loader)
    texts = [made.inputs_I[:-1] for made in loader._examples.make(np.arange(4000))]
    seen = np.concatenate([inputs[inputs != tokenizer.sentinel_id(0)] for inputs in texts])
    assert seen.min() == 3 and seen.max() == tokenizer.pieces - 1
    assert tokenizer.ordinary_ids.tolist() == list(range(3, tokenizer.pieces))


def test_objectives_share_tokens(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for objective in (SpanCorruption(), PrefixLM(), UL2(), BertStyle()):
        open_training(config_of(text(folder), objective), tokenizer, tmp_path, Host())
    assert len(list((tmp_path / "tokenized").glob("[!.]*"))) == 1
    open_training(config_of(text(folder), FullLM(), input_length=0), tokenizer, tmp_path, Host())
    assert len(list((tmp_path / "tokenized").glob("[!.]*"))) == 2


def test_a_tokenizer_with_too_few_sentinels_is_refused(
    folder: Path, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    few = SentencePieceTokenizer(tokenizer.serialized(), sentinels=1)
    with pytest.raises(UserError, match="needs 3 sentinels, tokenizer.sentinels is 1; nearest: 3"):
        open_training(config_of(text(folder), SpanCorruption()), few, tmp_path, Host())


def test_a_tokenizer_is_trained_on_all_parts(folder: Path, tmp_path: Path) -> None:
    config = config_of(mixture(folder), SpanCorruption())
    trained = dataclasses.replace(config, tokenizer=SentencePieceConfig(sentinels=100))
    source = open_training_text(trained, tmp_path)
    assert len(source) == 320
    assert [source[i]["text"] for i in (0, 299, 300)] == [LINES[0], LINES[299], "other words 0 here"]
    assert [record["text"] for record in source.read([301, 5, 6])] == ["other words 1 here", *LINES[5:7]]  # type: ignore[index]
    with pytest.raises(IndexError):
        source[320]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda f: mixture(f, by=ByRate(rates=(1.0,))), "there are 1 rates \\[1.0\\], but 2 parts"),
        (lambda f: mixture(f, by=ByRate(rates=(0.0, 0.0))), "mixture of nothing"),
        (lambda f: mixture(f, by=BySize(temperature=0.0)), "temperature is 0.0"),
        (lambda f: mixture(f, by=BySize(cap=0)), "cap is 0"),
        (lambda f: mixture(f, curriculum=(Stage(from_step=0, rates=(1.0, 1.0)),)), "must ascend from 1 on"),
        (lambda f: mixture(f, curriculum=(Stage(from_step=2, rates=(0.0, 0.0)),)), "mixture of nothing"),
        (lambda f: SourceMixture(parts=()), "a mixture needs at least one part"),
        (lambda f: Template(inputs="{a.b}", targets="x"), "must be a field's name alone"),
        (lambda f: Template(inputs="{0}", targets="x"), "must be a field's name alone"),
        (lambda f: Template(inputs="{a!r}", targets="x"), "must be a field's name alone"),
        (lambda f: Template(inputs="{a", targets="x"), "template '{a'"),
        (lambda f: config_of(mixture(f), PrefixLM(complementary=True)), "cannot come from a mixture"),
        (lambda f: config_of(mixture(f), Supervised()), "reads inputs and targets"),
    ],
)
def test_impossible_configs_are_refused(folder: Path, wrong: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wrong(folder)
