import os
import re
from pathlib import Path

import numpy as np
import pytest

from common.data.config import SentencePieceConfig
from common.data.sources.records import Problem
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
from common.data.tokenizers.tokenizer import open_tokenizer, training_lines
from common.errors import UserError
from tests.common.data.memory_source import MemorySource

SHARED = Path(os.environ.get("TWINSTACK_SHARED_DATA", "../shared/data"))

_DRAW = np.random.default_rng(0)
WORDS = [
    "".join(_DRAW.choice(["ka", "Stra", "ße", "lom", "är", "te", "pin", "gro"], _DRAW.integers(1, 5)))
    for _ in range(150)
]
LINES = [f"take {i} apples before {i + 7} o'clock, " + " ".join(_DRAW.choice(WORDS, 5)) for i in range(400)]

ODD_TEXTS = [
    "",
    " ",
    "   ",
    " lead",
    "trail ",
    "  two  inner   spaces ",
    "line\nbreak\n",
    "\n",
    "\r\n\ttab",
    "\x00nul\x00",
    "cafe\u0301 café",  # decomposed and composed
    "ﬁ ３ ℌ",  # compatibility characters
    "</s> <pad> <unk> <0x41> <extra_id_0>",  # names of pieces, as text
    "\u2581",  # SentencePiece's mark for a space
    "a\u2581b \u2581 c\u2581",
    "\u2581\u2581 lead",
    "\u2585 a\u2585b",  # SentencePiece's mark for an unknown piece
    "no-break\u00a0and\u202fnarrow\u3000wide",
    "🙂👩‍👩‍👧 日本語 עברית",
    "\ufeffbom \ufffd \U0010ffff",
    "x" * 5000,
    "take 3 apples before 10 o'clock",
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    config = SentencePieceConfig(vocab_size=360, model_type=request.param, sentinels=3)
    return SentencePieceTokenizer(train_model(LINES, config), sentinels=3)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_every_text_round_trips(trained: SentencePieceTokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert not np.isin(ids, [trained.pad_id, trained.eos_id, trained.unk_id]).any()
    assert (ids < trained.pieces).all(), "text spells no sentinel"
    assert trained.decode(ids) == text


def test_random_unicode_round_trips(trained: SentencePieceTokenizer) -> None:
    rng = np.random.default_rng(0)
    alphabet = [*"ab 1\n\u2581", *map(chr, rng.integers(0, 0xD800, 60)), *map(chr, rng.integers(0xE000, 0x110000, 60))]
    for size in rng.integers(1, 30, 300):
        text = "".join(rng.choice(alphabet, size))
        assert trained.decode(trained.encode(text)) == text


def test_layout_of_ids(trained: SentencePieceTokenizer) -> None:
    assert (trained.pad_id, trained.eos_id, trained.unk_id, trained.start_id) == (0, 1, 2, 0)
    assert trained.vocab_size == 360 and trained.table_size == 384 and trained.pieces == 357
    assert [trained.sentinel_id(k) for k in range(3)] == [359, 358, 357]
    with pytest.raises(UserError, match="sentinel 3"):
        trained.sentinel_id(3)


def test_decoding_any_ids_that_a_model_may_generate(trained: SentencePieceTokenizer) -> None:
    apples = trained.encode("apples").tolist()
    assert trained.decode([0, *apples, 1, 0]) == "apples"
    assert trained.decode([359, *apples, 357]) == "<extra_id_0> apples <extra_id_2>"
    for padding in (360, 383):
        assert trained.decode([*apples, padding]) == trained.decode([*apples, trained.unk_id]) != "apples"


def test_batches_equal_single_texts(trained: SentencePieceTokenizer) -> None:
    for text, ids in zip(ODD_TEXTS, trained.encode_batch(ODD_TEXTS), strict=True):
        np.testing.assert_array_equal(ids, trained.encode(text))


def test_a_lone_surrogate_is_an_error(trained: SentencePieceTokenizer) -> None:
    with pytest.raises(UserError, match="surrogate"):
        trained.encode_batch(["good", "bad \ud800"])


@pytest.mark.parametrize("split", [True, False])
def test_split_digits(split: bool) -> None:
    lines = [f"{word} 2024, {word} 2025" for word in WORDS]
    tokenizer = SentencePieceTokenizer(train_model(lines, SentencePieceConfig(vocab_size=330, split_digits=split)))
    pieces = [tokenizer.decode([i]).strip() for i in tokenizer.encode("in 2024")]
    assert (max(len(piece) for piece in pieces if piece.isdigit()) == 1) == split


def test_training_is_deterministic_and_cached_by_content(tmp_path: Path) -> None:
    records = [{"inputs": line, "targets": line.upper(), "group": "\u0416" * 9} for line in LINES]
    source = MemorySource(records)
    config = SentencePieceConfig(vocab_size=340)
    first = open_tokenizer(config, source, tmp_path / "a")
    reads = source.reads
    assert reads == len(records)
    assert open_tokenizer(config, source, tmp_path / "a").content_hash == first.content_hash
    assert source.reads == reads, "the second comes from the cache"
    assert open_tokenizer(config, source, tmp_path / "b").content_hash == first.content_hash
    assert first.decode(first.encode("\u0416")) == "\u0416" and len(first.encode("\u0416")) == 3, (
        "groups are not trained on"
    )
    others = [
        open_tokenizer(SentencePieceConfig(vocab_size=341), source, tmp_path / "a"),
        open_tokenizer(SentencePieceConfig(vocab_size=341, sentinels=1), source, tmp_path / "a"),
        open_tokenizer(config, MemorySource(records[:200], "less"), tmp_path / "a"),
    ]
    assert len({first.content_hash, *(other.content_hash for other in others)}) == 4
    assert len(list((tmp_path / "a" / "tokenizers").glob("*.model"))) == 4


def test_text_without_a_usable_record_is_an_error() -> None:
    bad = Problem("x.jsonl line 1", "not JSON")
    with pytest.raises(UserError, match="no record of the .*; the first problem: x.jsonl line 1: not JSON"):
        list(training_lines(MemorySource([bad, bad]), 10))
    assert list(training_lines(MemorySource([bad, {"text": "a"}]), 10)) == ["a"]


def test_training_lines_are_evenly_spaced_and_short() -> None:
    source = MemorySource([{"text": f"{i}\n" + "y" * 2500} for i in range(100)])
    lines = list(training_lines(source, 3))
    assert [line for line in lines if line.isdigit()] == ["0", "33", "66"]
    assert [len(line) for line in lines[1:4]] == [1000, 1000, 500]


@pytest.mark.parametrize(
    ("lines", "size", "message"),
    [
        (["ab ab ab"] * 20, 5000, r"5000 is too large.*at most (\d+)"),
        (LINES, 200, r"200 is too small.*at least (\d+)"),
    ],
)
@pytest.mark.parametrize("sentinels", [0, 10])
def test_the_error_of_an_impossible_size_has_a_possible_one(
    lines: list[str], size: int, message: str, sentinels: int
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        train_model(lines, SentencePieceConfig(vocab_size=size, sentinels=sentinels))
    named = re.search(message, str(raised.value))
    assert named is not None
    possible = int(named[1])
    train_model(lines, SentencePieceConfig(vocab_size=possible, sentinels=sentinels))
    wrong = possible + 1 if size > possible else possible - 1
    with pytest.raises(UserError, match=str(possible)):
        train_model(lines, SentencePieceConfig(vocab_size=wrong, sentinels=sentinels))


def test_no_text_is_an_error() -> None:
    for lines, message in (([], "the training split is empty"), (["", "\u2585"], "all 3 lines are empty")):
        with pytest.raises(UserError, match=message):
            train_model(lines, SentencePieceConfig())


def test_lines_that_sentence_piece_would_skip_are_used_for_training() -> None:
    config = SentencePieceConfig(vocab_size=300)
    assert train_model([f"\u2585{line}\u2585" for line in LINES], config) == train_model(LINES, config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model_type": "unigramm"},
        {"sentinels": -1},
        {"vocab_size": 100, "sentinels": 100},
        {"byte_fallback": False},
        {"training_records": 0},
    ],
)
def test_config_refuses(wrong: dict) -> None:
    with pytest.raises(UserError):
        SentencePieceConfig(**wrong)


def test_files_that_are_not_models(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"nothing of the kind")
    for name, message in (("x.model", "not a SentencePiece"), ("absent.model", "No such file")):
        with pytest.raises(UserError, match=message):
            open_tokenizer(SentencePieceConfig(path=str(tmp_path / name)), MemorySource([]), tmp_path)


def shared_model(name: str) -> str:
    path = SHARED / "tokenizers" / name
    if not path.exists():
        pytest.skip(f"{path} is absent: set TWINSTACK_SHARED_DATA")
    return str(path)


def test_t5_model(tmp_path: Path) -> None:
    config = SentencePieceConfig(path=shared_model("t5_spiece_32000.model"), sentinels=100)
    tokenizer = open_tokenizer(config, MemorySource([]), tmp_path)
    assert (tokenizer.vocab_size, tokenizer.table_size) == (32100, 32128)
    assert (tokenizer.sentinel_id(0), tokenizer.sentinel_id(99)) == (32099, 32000)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.start_id) == (0, 1, 2, 0)
    text = "translate English to German: The house is wonderful."
    assert tokenizer.encode(text).tolist() == [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([32099, *tokenizer.encode(text)]).startswith("<extra_id_0> translate")


def test_a_loaded_model_keeps_its_own_ids(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(
        SentencePieceConfig(path=shared_model("sentencepiece_test_model_1000.model")), MemorySource([]), tmp_path
    )
    assert (tokenizer.unk_id, tokenizer.start_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 0)
    assert tokenizer.decode(tokenizer.encode("Hello world.")) == "Hello world."
