"""Which ids stand for the texts that a model scores."""

import types
from typing import Any

import numpy as np
import pytest

from common.data.config import BytePairConfig
from common.data.tokenizers.byte_pair import BytePairTokenizer, train_model
from common.errors import UserError
from common.infer.scored_texts import to_pair
from common.infer.texts import TextCodec, TextConventions
from tests.helpers import VOCAB

WORDS = BytePairConfig(vocab_size=275)
MODEL_VOCAB = 384
BOS, START, EOS = 5, 3, 1


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer.trained(train_model(["one two three four five"] * 20, WORDS), sentinels=0)


def settings(tokenizer: Any, *, add_bos: bool = False, **change: Any) -> TextCodec:
    ids: dict[str, Any] = {"alignment": "start_token", "start_id": START, "eos_ids": (EOS, 9), "bos_id": BOS}
    return TextCodec(tokenizer=tokenizer, conventions=TextConventions(**ids | change), add_bos=add_bos)


def ids(text: BytePairTokenizer, value: str) -> list[int]:
    return text.encode(value).tolist()


def test_supervised_pairs_end_inputs_with_eos(tokenizer: BytePairTokenizer) -> None:
    p = to_pair({"inputs": "one two", "targets": "three"}, settings(tokenizer), MODEL_VOCAB, eos=False)
    assert p.example.inputs_I.tolist() == [*ids(tokenizer, "one two"), EOS] and p.start_id == START
    assert p.example.targets_T.tolist() == ids(tokenizer, "three")
    ended = to_pair({"inputs": "", "targets": ""}, settings(tokenizer), MODEL_VOCAB, eos=True)
    assert (ended.example.inputs_I.tolist(), ended.example.targets_T.tolist()) == ([EOS], [EOS])
    begun = to_pair({"inputs": "one", "targets": ""}, settings(tokenizer, add_bos=True), MODEL_VOCAB, eos=False)
    assert begun.example.inputs_I.tolist() == [BOS, *ids(tokenizer, "one"), EOS]
    unended = settings(tokenizer, eos_after_inputs=False)
    p = to_pair({"inputs": "one two", "targets": "three"}, unended, MODEL_VOCAB, eos=False)
    assert p.example.inputs_I.tolist() == ids(tokenizer, "one two")


@pytest.mark.parametrize("change", [{"start_id": VOCAB}, {"eos_ids": (VOCAB,)}, {"add_bos": True, "bos_id": VOCAB}])
def test_special_ids_beyond_the_table_are_errors(change: dict[str, Any]) -> None:
    """Without a tokenizer, nothing has compared a model's special ids with its token table before."""
    text = settings(None, alignment="native", **change)
    with pytest.raises(UserError, match=f"it contains token {VOCAB}; ids go from 0 to {VOCAB - 1}"):
        to_pair({"text": []}, text, VOCAB, eos=True)


@pytest.mark.parametrize("add_bos", [False, True])
def test_native_pairs_are_one_text(tokenizer: BytePairTokenizer, add_bos: bool) -> None:
    text = settings(tokenizer, alignment="native", add_bos=add_bos)
    whole = [*([BOS] if add_bos else []), *ids(tokenizer, "one two three")]
    for before, after in (("inputs", "targets"), ("context", "continuation")):
        p = to_pair({before: "one two", after: " three"}, text, MODEL_VOCAB, eos=False)
        assert p.start_id == whole[0] and p.example.targets_T.tolist() == whole[1:] and not len(p.example.inputs_I)
        assert p.example.weights_T.sum() == len(ids(tokenizer, " three"))
    alone = to_pair({"text": "one"}, text, MODEL_VOCAB, eos=True)
    assert alone.start_id == (BOS if add_bos else START), "a first token is scored too"
    assert alone.example.targets_T.tolist() == [*ids(tokenizer, "one"), EOS] and alone.example.weights_T.all()


def test_language_models_with_a_start_token(tokenizer: BytePairTokenizer) -> None:
    p = to_pair({"context": "one", "continuation": " two"}, settings(tokenizer), MODEL_VOCAB, eos=False)
    assert p.start_id == START and not len(p.example.inputs_I)
    assert p.example.targets_T.tolist() == ids(tokenizer, "one two")


def test_texts_are_encoded_separately_where_a_token_would_span_both(tokenizer: BytePairTokenizer) -> None:
    assert ids(tokenizer, " three")[:2] != ids(tokenizer, " t"), "together they would be one token"
    text = settings(tokenizer, alignment="native")
    p = to_pair({"context": " t", "continuation": "hree"}, text, MODEL_VOCAB, eos=False)
    assert [p.start_id, *p.example.targets_T.tolist()] == ids(tokenizer, " t") + ids(tokenizer, "hree")


def test_a_continuation_is_encoded_as_the_middle_of_a_text() -> None:
    """A tokenizer may mark the beginning of a text; the continuation gets no mark."""
    fake = types.SimpleNamespace(encode_with_sentinels=lambda text: np.array([9, *map(ord, text)], np.int32))
    p = to_pair({"context": "a", "continuation": "b"}, settings(fake, alignment="native"), MODEL_VOCAB, eos=False)
    assert [p.start_id, *p.example.targets_T.tolist()] == [9, ord("a"), ord("b")]
