"""Text conventions of foreign models: tokenizers, special ids, what surrounds a text."""

import json

import pytest
import tokenizers

from common.infer.texts import encode_prompt
from common.weights.folder import read_manifest
from experiments.models.finding import find_model
from tests.common.weights import foreign
from tests.common.weights.foreign import GPT2, LLAMA, T5
from tests.experiments.models.conversions import run


def text_of(tmp_path, config, files=None):
    make = {"t5": foreign.t5, "mt5": foreign.t5, "gpt2": foreign.gpt2, "llama": foreign.llama}[config["model_type"]]
    source = foreign.write_hugging_face(tmp_path / "in", config, make(config), files=files)
    run(source, tmp_path / "ours")
    for name in files or {}:
        assert (tmp_path / "ours" / "source" / name).read_text() == files[name]
    return read_manifest(tmp_path / "ours")["text"]


BYTE_PAIR = {"kind": "byte_pair", "file": "source/tokenizer.json", "sentinels": 0}
TEMPLATE = {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]}}
FILES = {"kind": "byte_pair", "vocab": "source/vocab.json", "merges": "source/merges.txt"}


@pytest.mark.parametrize(
    ("config", "files", "tokenizer"),
    [
        (T5, {}, None),
        (T5, {"spiece.model": "x"}, {"kind": "sentencepiece", "file": "source/spiece.model", "sentinels": 100}),
        (
            T5,
            {"spiece.model": "x", "tokenizer_config.json": '{"extra_ids": 7}'},
            {"kind": "sentencepiece", "file": "source/spiece.model", "sentinels": 7},
        ),
        (
            T5,
            {
                "spiece.model": "x",
                "tokenizer_config.json": json.dumps(
                    {"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>", "<x>"]}
                ),
            },
            {"kind": "sentencepiece", "file": "source/spiece.model", "sentinels": 2},
        ),
        (
            T5 | {"model_type": "mt5"},
            {"spiece.model": "x"},
            {"kind": "sentencepiece", "file": "source/spiece.model", "sentinels": 0},
        ),
        (T5, {"tokenizer.json": "{}"}, BYTE_PAIR),
        (GPT2, {"tokenizer.json": "{}", "vocab.json": "{}", "merges.txt": ""}, BYTE_PAIR | {"add_bos": False}),
        (GPT2, {"vocab.json": "{}", "merges.txt": ""}, FILES | {"add_bos": False}),
        (GPT2, {"vocab.json": "{}"}, None),
        (LLAMA, {"tokenizer.json": json.dumps(TEMPLATE)}, BYTE_PAIR | {"add_bos": True}),
        (LLAMA, {"tokenizer.json": "{}"}, BYTE_PAIR | {"add_bos": False}),
        (
            LLAMA,
            {"tokenizer.json": json.dumps(TEMPLATE), "tokenizer_config.json": '{"add_bos_token": false}'},
            BYTE_PAIR | {"add_bos": False},
        ),
        (
            LLAMA,
            {"tokenizer.model": "x"},
            {"kind": "sentencepiece", "file": "source/tokenizer.model", "sentinels": 0, "add_bos": True},
        ),
    ],
)
def test_tokenizers(tmp_path, config, files, tokenizer):
    assert text_of(tmp_path, config, files)["tokenizer"] == tokenizer


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (T5, {}, ("start_token", 0, [1], None)),
        (T5 | {"decoder_start_token_id": 3, "eos_token_id": None}, {}, ("start_token", 3, [], None)),
        (GPT2, {}, ("native", 40, [40], 40)),
        (LLAMA, {"eos_token_id": [2, 7]}, ("native", 1, [2, 7], 1)),
        (LLAMA | {"bos_token_id": None}, {}, ("native", 2, [2], None)),
    ],
)
def test_special_ids(tmp_path, config, generation, expected):
    text = text_of(tmp_path, config, {"generation_config.json": json.dumps(generation)})
    assert (text["alignment"], text["start_id"], text["eos_ids"], text["bos_id"]) == expected


WORDS = {"<unk>": 2, "</s>": 1, "<pad>": 0, "<s>": 3, "<sep>": 4, "take": 5, "two": 6}


def word_tokenizer(post_processor):
    """Returns a tokenizer of whole words."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([name for name in WORDS if name.startswith("<")])
    made.post_processor = post_processor
    return made


def template(single):
    names = [(name, WORDS[name]) for name in single.split() if name in WORDS]
    return tokenizers.processors.TemplateProcessing(single=single, special_tokens=names)


ROBERTA = tokenizers.processors.RobertaProcessing(("</s>", 1), ("<s>", 3))
NESTED = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(), template("<s> $A </s>")])


@pytest.mark.parametrize(
    ("post", "remark"),
    [
        (None, None),
        (template("$A </s>"), None),
        (template("<s> $A </s>"), "inputs begin with <s> (id 3), as tokenizer.json says"),
        (NESTED, "inputs begin with <s> (id 3), as tokenizer.json says"),
        (ROBERTA, "inputs begin with <s> (id 3), as tokenizer.json says"),
        (template("$A"), "inputs end without an end token, as tokenizer.json says"),
        (template("<s> <sep> $A </s>"), "tokenizer.json puts <s> <sep> before every text, which is ignored"),
        (template("$A <sep> </s>"), "tokenizer.json puts <sep> </s> after every text, which is ignored"),
    ],
    ids=["none", "t5", "start", "nested", "roberta", "no-end", "two-before", "two-after"],
)
def test_special_tokens_around_inputs_are_added_or_reported(tmp_path, post, remark):
    theirs = word_tokenizer(post)
    source = foreign.write_hugging_face(tmp_path / "in", T5, foreign.t5(T5), files={"tokenizer.json": theirs.to_str()})
    *remarks, _ = run(source, tmp_path / "ours")
    assert remarks == ([] if remark is None else [remark])
    if post is not None and "ignored" not in str(remark):
        text = find_model(str(tmp_path / "ours")).open_text()
        assert encode_prompt("take two", text).inputs_I.tolist() == theirs.encode("take two").ids


@pytest.mark.parametrize(
    ("single", "expected", "remark"),
    [
        ("<s> $A", [3, 5, 6], "texts begin with <s> (id 3), as tokenizer.json says"),
        (
            "$A </s>",
            [5, 6],
            "tokenizer.json puts </s> after every text, which is ignored, since a completion continues",
        ),
        ("$A", [5, 6], None),
    ],
)
def test_special_tokens_around_texts_to_continue(tmp_path, single, expected, remark):
    files = {"tokenizer.json": word_tokenizer(template(single)).to_str()}
    source = foreign.write_hugging_face(tmp_path / "in", LLAMA, foreign.llama(LLAMA), files=files)
    *remarks, _ = run(source, tmp_path / "ours")
    assert [remark is not None and line.startswith(remark) for line in remarks] == [True] * (remark is not None)
    prompt = encode_prompt("take two", find_model(str(tmp_path / "ours")).open_text())
    assert [*prompt.inputs_I, prompt.start] == expected
