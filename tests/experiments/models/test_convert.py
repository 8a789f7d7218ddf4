"""Parameters of Hugging Face models: into model folders and back, bit for bit."""

import numpy as np
import pytest

from common.errors import UserError
from common.trees import flatten
from common.weights import folder as model_folder
from common.weights import stream
from common.weights.folder import leaf_shapes
from tests.common.weights import foreign
from tests.common.weights.foreign import BF16, GPT2, LLAMA, T5, T5_V1_1
from tests.experiments.models.conversions import MODELS, config_of, leaves, module_shapes, round_trip, run


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path, name, dtype, shards):
    config, make = MODELS[name]
    ours = round_trip(tmp_path, config, make(config, dtype), shards=shards)
    assert {info.dtype for info in flatten(leaf_shapes(ours), "/").values()} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", MODELS)
def test_leaves_are_the_models_parameters(tmp_path, name):
    """The shapes that tables derive from suffixes are those of the modules."""
    config, make = MODELS[name]
    run(foreign.write_hugging_face(tmp_path / "in", config, make(config)), tmp_path / "ours")
    found = {leaf: info.shape for leaf, info in flatten(leaf_shapes(tmp_path / "ours"), "/").items()}
    assert found == module_shapes(config_of(tmp_path / "ours"))
    assert config_of(tmp_path / "ours").param_count() == sum(int(np.prod(shape)) for shape in found.values())


def test_values_by_index(tmp_path):
    """Compares entries with the layouts' definitions: T5's (out, in), GPT-2's (in, out) with q, k, v side by side."""
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
def test_a_separate_head_unties_embeddings_despite_the_config(tmp_path, config, make, scaled):
    tensors = make(config)
    tensors["lm_head.weight"] = foreign.fill({"w": (config["vocab_size"], 12)}, seed=9)["w"]
    recipe = config_of(round_trip(tmp_path, config, tensors)).recipe
    assert (recipe.tied_embeddings, recipe.scale_logits) == (False, scaled)


@pytest.mark.parametrize("stored", [True, False])
def test_a_v1_1_without_a_separate_head_is_tied_and_not_scaled(tmp_path, stored):
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


def test_a_buffer_with_other_values_is_an_error(tmp_path):
    tensors = foreign.gpt2() | {"transformer.h.0.attn.bias": np.ones((1, 1, 16, 16), bool)}
    with pytest.raises(UserError, match=r"transformer.h.0.attn.bias should be a causal mask"):
        run(foreign.write_hugging_face(tmp_path / "in", GPT2, tensors), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_blocks_and_chunks_of_any_size(tmp_path, monkeypatch):
    """Tensors may be read and stored in several pieces."""
    monkeypatch.setattr(stream, "BLOCK_BYTES", 200)
    monkeypatch.setattr(model_folder, "CHUNK_BYTES", 150)
    for name, (config, make) in MODELS.items():
        tensors = make(config)
        if name == "t5":
            tensors["lm_head.weight"] = tensors["shared.weight"].copy()
        round_trip(tmp_path / name, config, tensors)
