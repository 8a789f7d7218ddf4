import hashlib
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, processors

from common.config import apply_overrides, from_json, to_json
from common.data.config import BytePairConfig, DataConfig, SentencePieceConfig
from common.data.sources.config import SourceConfig
from common.data.tokenizers.byte_pair import BytePairTokenizer, load_byte_pair, train_model
from common.data.tokenizers.tokenizer import open_tokenizer
from common.errors import UserError
from tests.common.data.memory_source import MemorySource
from tests.common.data.tokenizers.test_tokenizer import LINES, ODD_TEXTS, SHARED

NAMES = ["</s> <pad> <unk> ⟨pad⟩⟨eos⟩ ⟨unk⟩ <extra_id_0> <|endoftext|>", "⟨eos⟩"]
LEAST = 259


def trained_bytes(lines: list[str] = LINES, **change: Any) -> bytes:
    return train_model(lines, BytePairConfig(**{"vocab_size": 340, **change}))


@pytest.fixture(scope="module")
def trained() -> BytePairTokenizer:
    return BytePairTokenizer.trained(trained_bytes(sentinels=3), sentinels=3)


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's vocab.json and merges.txt."""
    packed = SHARED / "tokenizers" / "gpt2"
    if not packed.exists():
        pytest.skip(f"{packed} is absent: set TWINSTACK_SHARED_DATA")
    folder = tmp_path_factory.mktemp("gpt2")
    for name, there in (("encoder.json.xz", "vocab.json"), ("vocab.bpe.xz", "merges.txt")):
        (folder / there).write_bytes(lzma.decompress((packed / name).read_bytes()))
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> Any:
    return open_tokenizer(BytePairConfig(path=str(gpt2_folder)), MemorySource([]), gpt2_folder)


@pytest.mark.parametrize("text", [*ODD_TEXTS, *NAMES])
@pytest.mark.parametrize("which", ["trained", "gpt2"])
def test_every_text_round_trips(which: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert not np.isin(ids, [tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id]).any(), "text spells no special"
    assert (ids < tokenizer.vocab_size - tokenizer.sentinels).all(), "text spells no sentinel"
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("which", ["trained", "gpt2"])
def test_random_unicode_round_trips(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(which)
    rng = np.random.default_rng(0)
    points = [*rng.integers(0, 0xD800, 60), *rng.integers(0xE000, 0x110000, 60), *range(0x80, 0x110)]
    alphabet = [*"ab 1\n\t'", *map(chr, points)]
    texts = ["".join(rng.choice(alphabet, size)) for size in rng.integers(1, 30, 400)]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(texts)] == texts


def test_layout_of_ids(trained: BytePairTokenizer) -> None:
    assert (trained.pad_id, trained.eos_id, trained.unk_id, trained.start_id, trained.bos_id) == (0, 1, 2, 0, None)
    assert trained.vocab_size == 340 and trained.table_size == 384 and trained.sentinels == 3
    assert [trained.sentinel_id(k) for k in range(3)] == [339, 338, 337]
    for k in (-1, 3):
        with pytest.raises(UserError, match=f"sentinel {k}"):
            trained.sentinel_id(k)


def test_merges_shorten_the_training_text(trained: BytePairTokenizer) -> None:
    assert len(trained.encode(LINES[0])) < 0.7 * len(LINES[0].encode())
    assert len(trained.encode("\u65e5\u672c")) == 6, "unseen characters are bytes"


def test_decoding_any_ids_that_a_model_may_generate(trained: BytePairTokenizer) -> None:
    apples = trained.encode("apples").tolist()
    assert trained.decode([0, *apples, 1, 0]) == "apples"
    assert trained.decode([339, *apples, 337]) == "<extra_id_0> apples <extra_id_2>"
    for padding in (340, 383):
        assert trained.decode([*apples, padding]) == trained.decode([*apples, 2]) == "apples⟨unk⟩"
    assert trained.decode(trained.encode("é")[:1]) == "\ufffd", "half a character"
    assert trained.decode(np.array(apples, np.int32)) == "apples"


@pytest.mark.parametrize("which", ["trained", "gpt2"])
def test_its_files_load_as_the_same_tokenizer(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = request.getfixturevalue(which)
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    again = load_byte_pair(tmp_path / "tokenizer.json", sentinels=tokenizer.appended_sentinels, eos=None)
    for fact in ("pad_id", "eos_id", "unk_id", "start_id", "bos_id", "vocab_size", "sentinels"):
        assert getattr(again, fact) == getattr(tokenizer, fact), fact
    for text in (*ODD_TEXTS, *NAMES):
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert again.files() == tokenizer.files()


def test_training_text_that_spells_special_names_stays_text() -> None:
    """Every merge of these lines leads to such a name, which must not become the special id."""
    lines = ["<pad></s><unk>⟨pad⟩⟨eos⟩⟨unk⟩"] * 50
    tokenizer = BytePairTokenizer.trained(trained_bytes(lines, vocab_size=270), sentinels=0)
    ids = tokenizer.encode(lines[0])
    assert ids.min() > 2 and tokenizer.decode(ids) == lines[0]


def test_a_lone_surrogate_is_an_error(trained: BytePairTokenizer) -> None:
    with pytest.raises(UserError, match="surrogate.*bad"):
        trained.encode_batch(["good", "bad \ud800"])


def test_training_is_deterministic_over_processes() -> None:
    """Most pairs in this text are equally frequent, so their order is decided by ties."""
    lines = [chr(97 + i) + chr(97 + j) for i in range(26) for j in range(26)]
    expected = hashlib.sha256(trained_bytes(lines)).hexdigest()
    code = (
        "import hashlib; from common.data.config import BytePairConfig\n"
        "from common.data.tokenizers.byte_pair import train_model\n"
        f"print(hashlib.sha256(train_model({lines!r}, BytePairConfig(vocab_size=340))).hexdigest())"
    )
    for cores in ("1", "4"):
        environment = {**os.environ, "PYTHONPATH": os.getcwd(), "RAYON_NUM_THREADS": cores}
        process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert process.stdout.strip() == expected, process.stderr


def test_training_is_cached_by_content(tmp_path: Path) -> None:
    source = MemorySource([{"inputs": line, "targets": line.upper()} for line in LINES])
    config = BytePairConfig(vocab_size=340)
    first = open_tokenizer(config, source, tmp_path)
    reads = source.reads
    assert open_tokenizer(config, source, tmp_path).content_hash == first.content_hash and source.reads == reads
    others: list[Any] = [
        BytePairConfig(vocab_size=341),
        BytePairConfig(vocab_size=341, sentinels=1),
        SentencePieceConfig(vocab_size=340),
    ]
    hashes = {first.content_hash, *(open_tokenizer(other, source, tmp_path).content_hash for other in others)}
    assert len(hashes) == 4 and len(list((tmp_path / "tokenizers").glob("*.model"))) == 4


@pytest.mark.parametrize("sentinels", [0, 10])
def test_the_error_of_an_impossible_size_has_a_possible_one(sentinels: int) -> None:
    with pytest.raises(UserError, match=r"vocab_size 500 is too large, at most (\d+)") as raised:
        trained_bytes(["ab ab ab"] * 9, vocab_size=500, sentinels=sentinels)
    possible = int(str(raised.value).split("at most ")[1].split()[0])
    trained_bytes(["ab ab ab"] * 9, vocab_size=possible, sentinels=sentinels)
    with pytest.raises(UserError, match=str(possible)):
        trained_bytes(["ab ab ab"] * 9, vocab_size=possible + 1, sentinels=sentinels)


def test_no_text_is_an_error() -> None:
    with pytest.raises(UserError, match="no text"):
        trained_bytes([])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sentinels": -1}, "sentinels is -1"),
        ({"vocab_size": LEAST + 4, "sentinels": 5}, f"least, with 5 sentinels, is {LEAST + 5}"),
        ({"training_records": 0}, "training_records is 0"),
        ({"eos": "</s>"}, "path is not given"),
    ],
)
def test_config_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BytePairConfig(**wrong)


def test_configs_of_both_kinds_survive_json_and_overrides() -> None:
    source = SourceConfig(name="text:x", inputs="a", targets="b")
    for tokenizer in (BytePairConfig(vocab_size=900, sentinels=7), SentencePieceConfig(model_type="bpe")):
        config = DataConfig(source=source, tokenizer=tokenizer, rows=1, input_length=1, target_length=1)
        assert from_json(DataConfig, json.loads(json.dumps(to_json(config)))) == config
    changed = apply_overrides(config, ["tokenizer.kind=byte_pair", "tokenizer.vocab_size=2000"])
    assert changed.tokenizer == BytePairConfig(vocab_size=2000)
    with pytest.raises(UserError, match="byte_pair, sentencepiece"):
        apply_overrides(config, ["tokenizer.kind=bytes"])


def test_gpt2(gpt2: Any) -> None:
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode(" Hello\n\nworld's 2024").tolist() == [18435, 198, 198, 6894, 338, 48609]
    assert (gpt2.vocab_size, gpt2.table_size) == (50257, 50304)
    assert {gpt2.eos_id, gpt2.start_id, gpt2.pad_id, gpt2.unk_id} == {50256} and gpt2.bos_id is None
    assert gpt2.decode([50256, 15496, 995, 50256]) == "Hello world"
    assert gpt2.decode([15496, 50300]) == "Hello"
    assert gpt2.encode("<|endoftext|>").tolist() != [50256]


def test_vocabulary_files_and_tokenizer_json_encode_the_same(gpt2: Any, gpt2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(gpt2._tokenizer.to_str())
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        whole = open_tokenizer(BytePairConfig(path=str(path)), MemorySource([]), tmp_path)
        assert whole.eos_id == 50256
        for text in ODD_TEXTS:
            np.testing.assert_array_equal(whole.encode(text), gpt2.encode(text))


def test_sentinels_above_a_loaded_vocabulary(gpt2_folder: Path) -> None:
    config = BytePairConfig(path=str(gpt2_folder), sentinels=100)
    tokenizer = open_tokenizer(config, MemorySource([]), gpt2_folder)
    assert tokenizer.vocab_size == 50357 and tokenizer.sentinel_id(0) == 50356 and tokenizer.sentinel_id(99) == 50257
    assert tokenizer.decode([50356, 15496]) == "<extra_id_0> Hello"


Edit = Callable[[tokenizers.Tokenizer], None]


def saved(folder: Path, specials: list[str], edit: Edit | None = None, **described: Any) -> BytePairConfig:
    """Saves a trained tokenizer with more special tokens, and a tokenizer_config.json if `described` is given."""
    made = tokenizers.Tokenizer.from_buffer(trained_bytes())
    made.add_special_tokens([AddedToken(name, special=True) for name in specials])
    if edit is not None:
        edit(made)
    (folder / "tokenizer.json").write_text(made.to_str())
    if described:
        (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return BytePairConfig(path=str(folder))


def wrap(single: str, *names: str) -> Edit:
    def edit(made: tokenizers.Tokenizer) -> None:
        ids = [(name, made.token_to_id(name)) for name in names]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)

    return edit


def test_llama_style_special_tokens(tmp_path: Path) -> None:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    config = saved(tmp_path, names, wrap("<|begin_of_text|> $A", names[0]), eos_token={"content": "<|eot_id|>"})
    tokenizer = open_tokenizer(config, MemorySource([]), tmp_path)
    assert (tokenizer.bos_id, tokenizer.start_id, tokenizer.eos_id, tokenizer.pad_id) == (340, 340, 342, 342)
    ids = tokenizer.encode("<|eot_id|>apples")
    assert ids.max() < 340, "neither bos in front nor a special token from the text"
    assert tokenizer.decode([340, *ids, 341, 342]) == "<|eot_id|>apples"


def test_t5_style_special_tokens(tmp_path: Path) -> None:
    names = ["<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>"]
    tokenizer = open_tokenizer(saved(tmp_path, names, wrap("$A </s>", "</s>")), MemorySource([]), tmp_path)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.start_id) == (340, 341, 342, 340)
    assert tokenizer.bos_id is None and tokenizer.sentinels == 2
    assert [tokenizer.sentinel_id(k) for k in range(2)] == [344, 343]
    apples = tokenizer.encode("apples").tolist()
    assert max(apples) < 340
    assert tokenizer.ordinary_ids.tolist() == list(range(3, 340))
    assert tokenizer.decode([344, *apples, 343, 341]) == "<extra_id_0> apples <extra_id_1>"
    with pytest.raises(UserError, match="already has 2; nearest: 0"):
        open_tokenizer(BytePairConfig(path=str(tmp_path), sentinels=100), MemorySource([]), tmp_path)


@pytest.mark.parametrize(("described", "bos"), [({}, None), ({"add_bos_token": True}, 340)])
def test_bos_by_description(tmp_path: Path, described: dict[str, Any], bos: int | None) -> None:
    config = saved(tmp_path, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>", **described)
    tokenizer = open_tokenizer(config, MemorySource([]), tmp_path)
    assert (tokenizer.start_id, tokenizer.bos_id) == (340, bos)


def test_padding_and_truncation_stored_in_the_file_are_not_applied(tmp_path: Path) -> None:
    def edit(made: tokenizers.Tokenizer) -> None:
        made.enable_truncation(4)
        made.enable_padding(length=64)

    tokenizer = open_tokenizer(saved(tmp_path, ["</s>"], edit), MemorySource([]), tmp_path)
    long, short = tokenizer.encode_batch(["many apples " * 30, "a"])
    assert len(long) > 30 and len(short) == 1


def test_eos_by_name(tmp_path: Path) -> None:
    plain = saved(tmp_path, ["<|im_end|>"])
    with pytest.raises(UserError, match=r"the tokenizer names no token that ends a text; set tokenizer\.eos"):
        open_tokenizer(plain, MemorySource([]), tmp_path)
    assert open_tokenizer(BytePairConfig(path=plain.path, eos="<|im_end|>"), MemorySource([]), tmp_path).eos_id == 340
    with pytest.raises(UserError, match="did you mean '<|im_end|>'"):
        open_tokenizer(BytePairConfig(path=plain.path, eos="<|im_edn|>"), MemorySource([]), tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "No such file"),
        ({}, "neither tokenizer.json nor vocab.json and merges.txt"),
        ({"vocab.json": "{}"}, "neither"),
        ({"tokenizer.json": "{}"}, "is not a tokenizer.json"),
        ({"tokenizer.json": "nothing of the kind"}, "is not a tokenizer.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "has no byte-pair tokenizer"),
        ({"vocab.json": "[]", "merges.txt": "a b\n"}, "has no byte-pair tokenizer"),
    ],
)
def test_files_that_are_not_a_tokenizer_are_errors(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "there"
    if files is not None:
        path.mkdir()
        for name, text in files.items():
            (path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_tokenizer(BytePairConfig(path=str(path)), MemorySource([]), tmp_path)
