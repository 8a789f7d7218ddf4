import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from flax import nnx
from rich.console import Console

from common.config import from_json
from common.errors import UserError
from common.infer.texts import encode_prompt
from common.progress import ProgressBars
from common.recipe import Execution
from common.trees import flatten
from common.weights import folder as model_folder
from common.weights import stream
from common.weights.folder import leaf_shapes, read_leaf, read_manifest, write_folder
from experiments.cli.main import main
from experiments.config import ModelConfig
from experiments.families import builder
from experiments.models.convert import convert
from experiments.models.finding import find_model
from tests.common.weights import foreign
from tests.common.weights.foreign import BF16, GPT2, LLAMA, T5, T5_V1_1

PROGRESS = ProgressBars(Console(file=io.StringIO()))


def run(source, destination, **options):
    return convert(Path(source), Path(destination), PROGRESS, **options)


def config_of(folder) -> ModelConfig:
    return from_json(ModelConfig, read_manifest(folder)["model"])


def leaves(folder):
    return {leaf: read_leaf(folder, leaf).read().result() for leaf in flatten(leaf_shapes(folder), "/")}


def module_shapes(config):
    build = builder(config, Execution())
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param))
    return {leaf: value.shape for leaf, value in flatten(params, "/").items()}


def round_trip(tmp_path, config, tensors, **write):
    """The model folder, after checking that what comes back is what went in."""
    source = foreign.write_hugging_face(tmp_path / "in", config, tensors, **write)
    run(source, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "out", to="hf")
    files = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert foreign.read_hugging_face(tmp_path / "out") == foreign.read_hugging_face(source)
    for name in files:  # small ones, and as it happens the headers of safetensors too
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    return tmp_path / "ours"


MODELS = {
    "t5": (T5, foreign.t5),
    "t5-v1.1": (T5_V1_1, foreign.t5),
    "mt5": (T5_V1_1 | {"model_type": "mt5"}, foreign.t5),
    "gpt2": (GPT2, foreign.gpt2),
    "llama": (LLAMA, foreign.llama),
    "llama-tied": (LLAMA | {"tie_word_embeddings": True}, foreign.llama),
}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, dtype, shards):
    config, make = MODELS[name]
    ours = round_trip(tmp_path, config, make(config, dtype), shards=shards)
    assert {info.dtype for info in flatten(leaf_shapes(ours), "/").values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", MODELS)
def test_leaves_are_the_models_parameters(tmp_path, name):
    """The shapes that tables take from letters are those of the modules themselves."""
    config, make = MODELS[name]
    run(foreign.write_hugging_face(tmp_path / "in", config, make(config)), tmp_path / "ours")
    found = {leaf: info.shape for leaf, info in flatten(leaf_shapes(tmp_path / "ours"), "/").items()}
    assert found == module_shapes(config_of(tmp_path / "ours"))
    assert config_of(tmp_path / "ours").param_count() == sum(int(np.prod(shape)) for shape in found.values())


def test_values_by_index(tmp_path):
    """Entry by entry against the layouts' definitions: T5's (out, in), GPT-2's (in, out) with q, k, v side by side."""
    tensors = foreign.t5()
    run(foreign.write_hugging_face(tmp_path / "t5", T5, tensors), tmp_path / "ours-t5")
    ours = leaves(tmp_path / "ours-t5")
    block = "decoder.block.2.layer.1.EncDecAttention"
    assert ours["decoder/cross_attention/query_DHC"][2, 3, 4, 1] == tensors[f"{block}.q.weight"][4 * 4 + 1, 3]
    assert ours["decoder/cross_attention/out_HCD"][2, 4, 1, 3] == tensors[f"{block}.o.weight"][3, 4 * 4 + 1]
    bias = tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert np.array_equal(ours["encoder_bias/table_HR"], bias.T)
    tensors = foreign.gpt2()
    run(foreign.write_hugging_face(tmp_path / "gpt2", GPT2, tensors), tmp_path / "ours-gpt2")
    ours = leaves(tmp_path / "ours-gpt2")
    fused, bias = tensors["transformer.h.1.attn.c_attn.weight"], tensors["transformer.h.1.attn.c_attn.bias"]
    assert ours["layers/attention/value_DGC"][1, 5, 2, 3] == fused[5, 2 * 12 + 2 * 4 + 3]
    assert ours["layers/attention/key_bias_GC"][1, 2, 3] == bias[12 + 2 * 4 + 3]
    tensors = foreign.llama()
    run(foreign.write_hugging_face(tmp_path / "llama", LLAMA, tensors), tmp_path / "ours-llama")
    ours = leaves(tmp_path / "ours-llama")
    assert ours["layers/attention/key_DGC"][2, 5, 1, 3] == tensors["model.layers.2.self_attn.k_proj.weight"][7, 5]
    assert np.array_equal(ours["output/weight_DV"], tensors["lm_head.weight"].T)


def test_dtypes_may_differ_between_leaves_and_between_layers_of_one(tmp_path):
    tensors = foreign.t5(T5_V1_1, np.float16)
    wo = [name for name in tensors if name.endswith("wo.weight")]
    for name in wo:
        tensors[name] = tensors[name].astype(np.float32) + 1e-5
    odd = "encoder.block.1.layer.0.SelfAttention.q.weight"
    tensors[odd] = tensors[odd].astype(BF16)
    found = flatten(leaf_shapes(round_trip(tmp_path, T5_V1_1, tensors)), "/")
    assert found["decoder/mlp/out_FD"].dtype == np.float32
    assert found["encoder/attention/query_DHC"].dtype == np.float32  # holds float16 and bfloat16 exactly
    assert found["encoder/attention/key_DGC"].dtype == np.float16


def test_special_values_keep_their_bits(tmp_path):
    tensors = foreign.llama()
    name = "model.layers.0.mlp.up_proj.weight"
    special = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001, 0x7F800000, 0xFF800000], np.uint32)
    tensors[name].reshape(-1)[: len(special)] = special.view(np.float32)
    round_trip(tmp_path, LLAMA, tensors)


COPIES = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("names", [COPIES, COPIES[:1], COPIES[2:]])
def test_copies_of_the_table_are_written_again(tmp_path, names):
    tensors = foreign.t5()
    tensors |= {name: tensors["shared.weight"].copy() for name in names}
    ours = round_trip(tmp_path, T5, tensors)
    assert config_of(ours).recipe.tied_embeddings
    assert "output/weight_DV" not in leaves(ours)


def test_a_copy_may_stand_in_for_the_table(tmp_path):
    tensors = foreign.t5()
    tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    round_trip(tmp_path, T5, tensors)


@pytest.mark.parametrize("make", [foreign.gpt2, foreign.llama])
def test_a_tied_head_may_be_stored_or_not(tmp_path, make):
    config = GPT2 if make is foreign.gpt2 else LLAMA | {"tie_word_embeddings": True}
    tensors = make(config)
    table = "transformer.wte.weight" if config is GPT2 else "model.embed_tokens.weight"
    ours = round_trip(tmp_path, config, tensors | {"lm_head.weight": tensors[table].copy()})
    assert config_of(ours).recipe.tied_embeddings


def test_a_copy_that_differs_is_an_error(tmp_path):
    tensors = foreign.t5()
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    source = foreign.write_hugging_face(tmp_path / "in", T5, tensors)
    with pytest.raises(UserError, match=r"encoder.embed_tokens.weight should be a copy of shared.weight"):
        run(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("config", "make", "scaled"),
    [(T5, foreign.t5, True), (T5_V1_1, foreign.t5, False), (GPT2, foreign.gpt2, False)],
)
def test_a_head_of_its_own_unties_whatever_the_config_says(tmp_path, config, make, scaled):
    tensors = make(config)
    tensors["lm_head.weight"] = foreign.fill({"w": (config["vocab_size"], 12)}, seed=9)["w"]
    recipe = config_of(round_trip(tmp_path, config, tensors)).recipe
    assert (recipe.tied_embeddings, recipe.scale_logits) == (False, scaled)


@pytest.mark.parametrize("stored", [True, False])
def test_a_v1_1_without_a_head_of_its_own_is_tied_and_not_scaled(tmp_path, stored):
    tensors = foreign.t5(T5_V1_1)
    del tensors["lm_head.weight"]
    if stored:
        tensors["lm_head.weight"] = tensors["shared.weight"].copy()
    recipe = config_of(round_trip(tmp_path, T5_V1_1, tensors)).recipe
    assert (recipe.tied_embeddings, recipe.scale_logits) == (True, False)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2s_buffers_and_prefix(tmp_path, prefix):
    tensors = foreign.gpt2(prefix=prefix)
    for layer in range(2):
        tensors[f"{prefix}h.{layer}.attn.bias"] = np.tri(16, dtype=np.float32)[None, None]
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = np.full((), -1e4, np.float32)
    round_trip(tmp_path, GPT2, tensors)


def test_buffers_of_llama_and_t5(tmp_path):
    tensors = foreign.llama()
    frequencies = (500000.0 ** -(np.arange(0, 4, 2) / 4)).astype(np.float32)
    tensors |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": frequencies for layer in range(3)}
    round_trip(tmp_path / "llama", LLAMA, tensors)
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    round_trip(tmp_path / "t5", T5, foreign.t5() | {unused: np.ones((8, 5), np.float32)})


def test_a_buffer_that_is_another_is_an_error(tmp_path):
    tensors = foreign.gpt2() | {"transformer.h.0.attn.bias": np.ones((1, 1, 16, 16), bool)}
    with pytest.raises(UserError, match=r"transformer.h.0.attn.bias should be a causal mask"):
        run(foreign.write_hugging_face(tmp_path / "in", GPT2, tensors), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_blocks_and_chunks_of_any_size(tmp_path, monkeypatch):
    """Tensors that are read and stored in several pieces."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 200)
    monkeypatch.setattr(model_folder, "CHUNK_BYTES", 150)
    for name, (config, make) in MODELS.items():
        tensors = make(config)
        if name == "t5":
            tensors["lm_head.weight"] = tensors["shared.weight"].copy()
        round_trip(tmp_path / name, config, tensors)


def test_wrong_keys_end_with_status_2_and_nothing_behind(tmp_path, capsys):
    tensors = foreign.llama()
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.copy()
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((20, 12), np.float32)
    source = foreign.write_hugging_face(tmp_path / "in", LLAMA, tensors)
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;" in line
    assert "1 unexpected: model.layers.3.mlp.up_proj.weight;" in line
    assert "model.layers.0.mlp.up_proj.weight is [12, 20], expected [20, 12]" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_command_line(tmp_path, capsys):
    source = foreign.write_hugging_face(tmp_path / "in", GPT2, foreign.gpt2())
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert "gpt with" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "other"), "--to", "t5like", "--rung", "2"]) == 0
    assert config_of(tmp_path / "other").parameters == "shared"
    for arguments, message in [
        (["--to", "hf"], "exists"),
        (["--to", "huggingface"], "--to huggingface: valid: gpt, hf, t5like"),
        (["--to", "gpt"], "the model is a gpt already"),
        ([], "say --to"),
        (["--to", "hf", "--rung", "1"], "--rung is for --to t5like"),
        (["--to", "t5like", "--rung", "7"], "--rung is 7: it must be at most 4"),
        (["--to", "hf", "--config", "gpt2-small"], "--config is for T5X"),
    ]:
        assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "other"), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_pickles_and_other_sources_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps(GPT2))
    for source, message in [
        (tmp_path / "a", "has no model.safetensors"),
        (tmp_path / "none", "is no folder"),
        (tmp_path / "a" / "config.json", "is no folder"),
    ]:
        with pytest.raises(UserError, match=message):
            run(source, tmp_path / "ours")
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle"):
        run(tmp_path / "a", tmp_path / "ours")
    with pytest.raises(UserError, match="is a pickle"):
        run(tmp_path / "a" / "pytorch_model.bin", tmp_path / "ours")
    source = foreign.write_hugging_face(tmp_path / "b", GPT2 | {"model_type": "gtp2"}, foreign.gpt2())
    with pytest.raises(UserError, match="did you mean 'gpt2'"):
        run(source, tmp_path / "ours")
    assert list(tmp_path.glob(".*")) == []


# Text conventions.


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
    """A tokenizer.json of whole words."""
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
    ids=["none", "t5", "start", "nested", "roberta", "no-end", "two-before", "two-behind"],
)
def test_a_tokenizers_own_rules_for_inputs_are_followed_or_remarked_upon(tmp_path, post, remark):
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
def test_a_tokenizers_own_rules_for_texts_that_go_on(tmp_path, single, expected, remark):
    files = {"tokenizer.json": word_tokenizer(template(single)).to_str()}
    source = foreign.write_hugging_face(tmp_path / "in", LLAMA, foreign.llama(LLAMA), files=files)
    *remarks, _ = run(source, tmp_path / "ours")
    assert [remark is not None and line.startswith(remark) for line in remarks] == [True] * (remark is not None)
    prompt = encode_prompt("take two", find_model(str(tmp_path / "ours")).open_text())
    assert [*prompt.inputs_I, prompt.start] == expected


# T5X.


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("tied", "gated"), [(True, False), (False, True)])
def test_t5x_is_what_the_same_hugging_face_folder_is(tmp_path, tied, gated, stacked):
    """The key maps of both formats lead to the same leaves."""
    theirs = foreign.t5x(tied=tied, gated=gated)
    written = foreign.scanned(theirs) if stacked else theirs
    remarks = run(foreign.write_t5x(tmp_path / "t5x", written), tmp_path / "ours")
    assert any("assumed" in remark for remark in remarks)
    assert any("d_model=12" in remark for remark in remarks)
    run(tmp_path / "ours", tmp_path / "hf", to="hf")
    found = {
        name: np.frombuffer(data, np.float32).reshape(shape)
        for name, (_, shape, data) in foreign.read_hugging_face(tmp_path / "hf").items()
    }
    # From the table of T5X's own names: every kernel transposed.
    block = "decoder.block.2.layer."
    for key, value in {
        "shared.weight": theirs["token_embedder/embedding"],
        f"{block}1.EncDecAttention.k.weight": theirs["decoder/layers_2/encoder_decoder_attention/key/kernel"].T,
        f"{block}1.layer_norm.weight": theirs["decoder/layers_2/pre_cross_attention_layer_norm/scale"],
        f"{block}2.DenseReluDense.wo.weight": theirs["decoder/layers_2/mlp/wo/kernel"].T,
        "encoder.block.1.layer.0.SelfAttention.o.weight": theirs["encoder/layers_1/attention/out/kernel"].T,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": theirs[
            "encoder/relpos_bias/rel_embedding"
        ].T,
        "decoder.final_layer_norm.weight": theirs["decoder/decoder_norm/scale"],
    }.items():
        assert np.array_equal(found[key], value), key
    assert ("lm_head.weight" in found) != tied
    run(tmp_path / "hf", tmp_path / "again")
    assert all(np.array_equal(leaves(tmp_path / "again")[leaf], x) for leaf, x in leaves(tmp_path / "ours").items())


def test_t5x_with_a_named_size(tmp_path):
    source = foreign.write_t5x(tmp_path / "t5x", foreign.t5x(tied=True, gated=False))
    with pytest.raises(UserError, match="names no size of a t5like: did you mean 't5-v1.1-small'"):
        run(source, tmp_path / "ours", config_name="t5-v1-small")
    with pytest.raises(
        UserError,
        match="71 missing: decoder/layers_3/.* and 51 more; 60 of another shape: decoder/decoder_norm",
    ):
        run(source, tmp_path / "ours", config_name="t5-v1.0-small")
    assert [path.name for path in tmp_path.iterdir()] == ["t5x"]


def test_t5x_with_a_tokenizer_of_the_users(tmp_path):
    """The checkpoint has none; a file that is named goes along, anything else is one line."""
    source = foreign.write_t5x(tmp_path / "t5x", foreign.t5x(tied=True, gated=False))
    (tmp_path / "pieces.model").write_bytes(b"a model")
    with pytest.raises(UserError, match="nowhere.model is no file"):
        run(source, tmp_path / "ours", tokenizer=tmp_path / "nowhere.model")
    run(source, tmp_path / "ours", tokenizer=tmp_path / "pieces.model")
    described = json.loads((tmp_path / "ours" / "model.json").read_text())["text"]["tokenizer"]
    assert described == {"kind": "sentencepiece", "file": "source/pieces.model", "sentinels": 100}
    assert (tmp_path / "ours" / described["file"]).read_bytes() == b"a model"
    with pytest.raises(UserError, match="--tokenizer is for T5X checkpoints"):
        run(tmp_path / "ours", tmp_path / "more", to="hf", tokenizer=tmp_path / "pieces.model")


def test_a_folder_of_checkpoints_names_them(tmp_path):
    foreign.write_t5x(tmp_path / "run" / "checkpoint_100", foreign.t5x(tied=True, gated=False))
    with pytest.raises(UserError, match="it holds checkpoints: checkpoint_100"):
        run(tmp_path / "run", tmp_path / "ours")


def test_one_command_converts_a_foreign_checkpoint_further(tmp_path):
    """One command writes what two would, and leaves nothing of the intermediate folder."""
    source = foreign.write_t5x(tmp_path / "t5x", foreign.t5x(tied=True, gated=False))
    run(source, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "two", to="hf")
    assert any("read from shapes" in remark for remark in run(source, tmp_path / "one", to="hf"))
    assert foreign.read_hugging_face(tmp_path / "one") == foreign.read_hugging_face(tmp_path / "two")
    with pytest.raises(UserError, match="model.cross_attention is 'separate'"):
        run(source, tmp_path / "other", to="gpt")
    with pytest.raises(UserError, match="exists"):
        run(source, tmp_path / "one", to="hf")
    assert {path.name for path in tmp_path.iterdir()} == {"t5x", "ours", "one", "two"}


# Models trained here.


def test_a_trained_model_exports_in_its_own_dtype(tmp_path):
    """The half-precision source is not what float32 leaves are rounded to."""
    ours = round_trip(tmp_path, LLAMA, foreign.llama(dtype=np.float16))
    manifest = read_manifest(ours)
    trained = {leaf: value.astype(np.float32) * np.float32(1.0001) for leaf, value in leaves(ours).items()}
    with write_folder(tmp_path / "trained") as writer:
        writer.manifest(model=manifest["model"], text=manifest["text"], source=manifest["source"])
        for leaf, value in trained.items():
            writer.create(leaf, value.shape, value.dtype, stacked=leaf.startswith("layers")).write(value).result()
    run(tmp_path / "trained", tmp_path / "hf", to="hf")
    dtype, _, data = foreign.read_hugging_face(tmp_path / "hf")["model.norm.weight"]
    assert dtype == "F32"
    assert data == trained["final_norm/scale_D"].tobytes()


def test_a_model_without_counterpart_is_refused(tmp_path):
    run(foreign.write_hugging_face(tmp_path / "in", LLAMA, foreign.llama()), tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "other", to="t5like", rung=3)
    with pytest.raises(UserError, match=r"model.cross_attention is 'merged'"):
        run(tmp_path / "other", tmp_path / "out", to="hf")
    run(tmp_path / "other", tmp_path / "prefix", to="gpt")
    assert config_of(tmp_path / "prefix").input_attention == "bidirectional"
    with pytest.raises(UserError, match=r"model.input_attention is 'bidirectional'"):
        run(tmp_path / "prefix", tmp_path / "out", to="hf")


def test_leaves_that_do_not_fit_the_config_are_listed(tmp_path):
    run(foreign.write_hugging_face(tmp_path / "in", LLAMA, foreign.llama()), tmp_path / "ours")
    manifest = json.loads((tmp_path / "ours" / "model.json").read_text())
    manifest["model"]["num_layers"] = 4
    (tmp_path / "ours" / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"layers/mlp/out_FD is \[3, 20, 12\], expected \[4, 20, 12\]"):
        run(tmp_path / "ours", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


# Between families.


def test_the_relaxed_rung_is_the_same_weights_and_goes_back_to_the_same_bytes(tmp_path):
    for name, config, make in (("gpt2", GPT2, foreign.gpt2), ("llama", LLAMA, foreign.llama)):
        source = foreign.write_hugging_face(tmp_path / name, config, make(config))
        at = tmp_path / f"{name}-ours"
        run(source, at)
        run(at, at / ".." / f"{name}-relaxed", to="t5like", rung=4)
        run(tmp_path / f"{name}-relaxed", tmp_path / f"{name}-back", to="gpt")
        assert config_of(tmp_path / f"{name}-back") == config_of(at)
        run(tmp_path / f"{name}-back", tmp_path / f"{name}-out", to="hf")
        assert foreign.read_hugging_face(tmp_path / f"{name}-out") == foreign.read_hugging_face(source)


@pytest.mark.parametrize("rung", range(5))
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied"])
def test_every_rung_has_the_models_parameters(tmp_path, name, rung):
    config, make = MODELS[name]
    run(foreign.write_hugging_face(tmp_path / "in", config, make(config)), tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "other", to="t5like", rung=rung)
    ours, other = leaves(tmp_path / "ours"), leaves(tmp_path / "other")
    assert {leaf: x.shape for leaf, x in other.items()} == module_shapes(config_of(tmp_path / "other"))
    assert np.array_equal(other["decoder/attention/key_DGC"], ours["layers/attention/key_DGC"])
    if rung == 0:
        assert np.array_equal(other["decoder/cross_attention/key_DGC"], ours["layers/attention/key_DGC"])
        assert np.array_equal(other["decoder/cross_norm/scale_D"], ours["layers/attention_norm/scale_D"])
        assert np.array_equal(other["encoder_norm/scale_D"], ours["final_norm/scale_D"])
        assert np.array_equal(other["encoder/mlp/out_FD"], ours["layers/mlp/out_FD"])
    if rung < 3:
        with pytest.raises(UserError, match="only a t5like with"):
            run(tmp_path / "other", tmp_path / "back", to="gpt")


def test_carried_files_go_along(tmp_path):
    files = {"tokenizer.json": "{}", "generation_config.json": "{}"}
    source = foreign.write_hugging_face(tmp_path / "in", LLAMA, foreign.llama(), files=files)
    run(source, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "other", to="t5like")
    assert {path.name for path in (tmp_path / "other" / "source").iterdir()} == {*files, "config.json"}
    assert read_manifest(tmp_path / "other")["text"] == read_manifest(tmp_path / "ours")["text"]


# Memory.

MEASURE = """
import sys
from pathlib import Path
from rich.console import Console
from common.progress import ProgressBars
from experiments.models.convert import convert

def peak():
    # Not getrusage: what it calls the peak begins with that of the process that started this one.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), ProgressBars(Console()), to=sys.argv[3] or None)
print(peak() - before, file=sys.stderr)
"""


def peak_bytes(source, destination, to=""):
    """What a process of its own needs for a conversion, beyond what its imports need."""
    command = [sys.executable, "-c", MEASURE, str(source), str(destination), to]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(done.stderr.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.slow
def test_memory_stays_far_below_the_checkpoints_size(tmp_path):
    config = LLAMA | {"vocab_size": 100_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4}
    config |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    source = foreign.write_hugging_face(tmp_path / "in", config, foreign.llama(config), shards=2)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    largest = 100_000 * 768 * 4
    assert total > 7e8
    for begin, end, to in (("in", "ours", ""), ("ours", "out", "hf"), ("ours", "other", "t5like")):
        # Promised is 2 * largest + 2**30; this tells streaming from loading.
        assert peak_bytes(tmp_path / begin, tmp_path / end, to) < 2 * largest < total
    assert digest(source) == digest(tmp_path / "out")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.slow
def test_memory_with_stacked_t5x(tmp_path):
    """Stacked arrays are read whole, one at a time."""
    tensors = foreign.scanned(foreign.t5x(vocab=1000, d=512, heads=8, size=64, f=16384, tied=True, gated=True))
    source = foreign.write_t5x(tmp_path / "in", tensors, chunk=512)
    largest, total = 3 * 512 * 16384 * 4, sum(value.nbytes for value in tensors.values())
    assert peak_bytes(source, tmp_path / "ours") < 2 * largest + 2**27 < total


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}
