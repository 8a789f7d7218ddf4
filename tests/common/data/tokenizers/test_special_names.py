"""The contract of all tokenizers: text becomes neither a special token nor, unless requested, a sentinel."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from common.data.config import BytePairConfig, SentencePieceConfig
from common.data.tokenizers import sentence_piece
from common.data.tokenizers.byte_pair import BytePairTokenizer, load_byte_pair, train_model
from common.data.tokenizers.saved import load_saved, saved_files
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from tests.common.data.tokenizers.test_tokenizer import LINES, SHARED

T5 = SHARED / "tokenizers" / "t5_spiece_32000.model"
NAMES = ["<pad>", "</s>", "<unk>", "<s>", "<extra_id_0>", "<extra_id_1>", "\u2581<extra_id_0>", "<extra_id_99>"]
TEXTS = [
    "take 3 apples",
    "",
    " two  spaces ",
    *NAMES,
    "a</s> b<unk>c",
    "x<extra_id_0>",
    " ".join(NAMES),
    "<pad></s>" * 3,
]
PARK = "The <extra_id_0> walks in <extra_id_1> park"
PARK_IDS = [37, 32099, 10681, 16, 32098, 2447]


def t5_pieces() -> SentencePieceTokenizer:
    if not T5.exists():
        pytest.skip(f"{T5} is absent: set TWINSTACK_SHARED_DATA")
    return SentencePieceTokenizer(T5.read_bytes(), sentinels=100)


def t5_json(folder: Path) -> BytePairTokenizer:
    """T5's tokenizer.json, as `tokenizers` writes it: its pieces include all names of special tokens."""
    model = sentencepiece.SentencePieceProcessor(model_proto=t5_pieces().serialized())
    pieces = [(model.id_to_piece(token), model.get_score(token)) for token in range(model.get_piece_size())]
    names = [f"<extra_id_{k}>" for k in reversed(range(100))]
    made = tokenizers.Tokenizer(models.Unigram([*pieces, *((name, 0.0) for name in names)], unk_id=2))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "</s>", "<unk>", *names)])
    (folder / "tokenizer.json").write_text(made.to_str())
    return load_byte_pair(folder, sentinels=0, eos=None)


def mt5_like(folder: Path) -> SentencePieceTokenizer:
    """A model whose pieces include sentinels, which a text could spell."""
    model, symbols = io.BytesIO(), [f"\u2581<extra_id_{k}>" for k in (2, 1, 0)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=190, user_defined_symbols=symbols, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    return SentencePieceTokenizer(model.getvalue())


def merged_names(folder: Path) -> BytePairTokenizer:
    """A tokenizer with merges that lead to the names, as Llama 2's might."""
    merges = [("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">"), ("</s>", "</s>")]
    letters = sorted({c for text in TEXTS for c in text.replace(" ", "\u2581")} | {"\u2581", "."})
    vocabulary = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", *letters, "<s", "</", "</s", "</s></s>"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    (folder / "tokenizer.json").write_text(made.to_str())
    return load_byte_pair(folder, sentinels=2, eos=None)


def whole_words(folder: Path) -> BytePairTokenizer:
    """A tokenizer of whole words, including the names, with a sentinel that the file does not mark as special."""
    words = ["<unk>", "</s>", "<pad>", "take", "apples", "<extra_id_0>"]
    made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<unk>", "</s>", "<pad>"])
    made.add_tokens([AddedToken("<extra_id_0>", special=False)])
    (folder / "tokenizer.json").write_text(made.to_str())
    return load_byte_pair(folder, sentinels=0, eos=None)


def trained_pieces(folder: Path) -> SentencePieceTokenizer:
    """A tokenizer trained on text that contains the names."""
    config = SentencePieceConfig(vocab_size=360, sentinels=3)
    lines = [*LINES, *(f"{name} {name}" for name in NAMES for _ in range(50))]
    return SentencePieceTokenizer(sentence_piece.train_model(lines, config), sentinels=3)


def trained_bytes(folder: Path) -> BytePairTokenizer:
    config = BytePairConfig(vocab_size=400, sentinels=3)
    lines = [*LINES, *(f"{name} {name}" for name in NAMES for _ in range(50))]
    return BytePairTokenizer.trained(train_model(lines, config), sentinels=3)


KINDS: dict[str, Callable[[Path], Any]] = {
    "t5-pieces": lambda folder: t5_pieces(),
    "t5-json": t5_json,
    "mt5-like": mt5_like,
    "merged-names": merged_names,
    "whole-words": whole_words,
    "trained-pieces": trained_pieces,
    "trained-bytes": trained_bytes,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


def test_no_text_becomes_a_special_token(tokenizer: Tokenizer) -> None:
    """Special tokens' names do not become their ids, except unk for text that the tokenizer does not know."""
    sentinels = {tokenizer.sentinel_id(k) for k in range(tokenizer.sentinels)}
    special = sentinels | {tokenizer.pad_id, tokenizer.eos_id, tokenizer.start_id, tokenizer.bos_id}
    assert sentinels and len(special) > len(sentinels)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert special.isdisjoint(ids.tolist()), text
        assert set(ids.tolist()) - {tokenizer.unk_id} <= set(tokenizer.ordinary_ids.tolist())


def test_unk_is_not_spelled_by_its_name(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> None:
    """T5 does not know `<`; a tokenizer of whole words does not know any other word."""
    ids = tokenizer.encode("<unk>").tolist()
    assert tokenizer.unk_id not in ids or len(ids) > 2 or request.node.callspec.params["tokenizer"] == "whole-words"


def test_copies_encode_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Covers copies sent to other processes, and those loaded from the files that a run saves."""
    for name, content in saved_files(tokenizer).items():
        (tmp_path / name).write_bytes(content)
    for made in (copy.deepcopy(tokenizer), load_saved(tmp_path)):  # a worker process gets a copy made in the same way
        assert made.content_hash == tokenizer.content_hash
        assert (made.sentinels, made.sentinel_id(0)) == (tokenizer.sentinels, tokenizer.sentinel_id(0))
        for one, other in zip(made.encode_batch(TEXTS), tokenizer.encode_batch(TEXTS), strict=True):
            np.testing.assert_array_equal(one, other)


def test_sentinels_of_a_prompt_are_sentinels(tokenizer: Tokenizer) -> None:
    """Decoded text encodes to the same ids; sentinels beyond the last, and everything else, stay text."""
    first, last = tokenizer.sentinel_id(0), tokenizer.sentinel_id(tokenizer.sentinels - 1)
    text = f"take <extra_id_0> apples <extra_id_{tokenizer.sentinels - 1}>"
    ids = tokenizer.encode_with_sentinels(text)
    assert ids.dtype == np.int32
    assert [token for token in ids.tolist() if token not in set(tokenizer.ordinary_ids.tolist())] == [first, last]
    np.testing.assert_array_equal(ids[:-1], [*tokenizer.encode("take"), first, *in_mid_text(tokenizer, "apples")])
    assert tokenizer.decode(ids) == text
    np.testing.assert_array_equal(tokenizer.encode_with_sentinels(tokenizer.decode(ids)), ids)
    for plain in ("take</s>", f"<extra_id_{tokenizer.sentinels}>", "<extra_id_00>", "<extra_id_>", ""):
        np.testing.assert_array_equal(tokenizer.encode_with_sentinels(plain), tokenizer.encode(plain))


def in_mid_text(tokenizer: Tokenizer, word: str) -> list[int]:
    """The ids of a word in the middle of a text."""
    first = tokenizer.encode("take").tolist()
    both = tokenizer.encode(f"take {word}").tolist()
    assert both[: len(first)] == first
    return both[len(first) :]


@pytest.mark.parametrize("kind", ["t5-pieces", "t5-json"])
def test_prompts_of_t5(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind](tmp_path)
    assert tokenizer.encode_with_sentinels(PARK).tolist() == PARK_IDS
    assert tokenizer.encode(PARK).tolist() != PARK_IDS
    assert (
        tokenizer.decode([32099, 5295, 1782, 32098, 8, 32097, 1])
        == "<extra_id_0> cute dog <extra_id_1> the <extra_id_2>"
    )


@pytest.mark.parametrize("kind", ["pieces", "json"])
def test_prompts_encode_as_in_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pieces = t5_pieces()
    (tmp_path / "spiece.model").write_bytes(pieces.serialized())
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    ours = pieces if kind == "pieces" else load_byte_pair(tmp_path / "saved", sentinels=0, eos=None)
    prompts = [
        PARK,
        "<extra_id_0> dog<extra_id_1>.",
        "Thank you <extra_id_0> me to your party <extra_id_1> week",
        "summarize: It is <extra_id_99>",
        "<extra_id_0><extra_id_1> <extra_id_2>",
        "two  spaces  <extra_id_5>  here",
        "plain text, 1.5 %",
    ]
    for prompt in prompts:
        assert [*ours.encode_with_sentinels(prompt), ours.eos_id] == theirs(prompt).input_ids, prompt


def test_appending_sentinels_to_a_model_that_has_some_is_an_error(tmp_path: Path) -> None:
    own = mt5_like(tmp_path)
    assert (own.sentinels, own.appended_sentinels, own.vocab_size) == (3, 0, 190)
    assert SentencePieceTokenizer(own.serialized(), sentinels=3).content_hash == own.content_hash
    with pytest.raises(UserError, match="already has 3; nearest: 0"):
        SentencePieceTokenizer(own.serialized(), sentinels=100)
