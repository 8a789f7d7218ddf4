import dataclasses
import math

import numpy as np
import pytest

from common.errors import UserError
from common.recipe import GPT2 as GPT2_RECIPE
from common.recipe import LLAMA as LLAMA_RECIPE
from common.weights.mapping import match
from common.weights.settings import Settings
from gpt.config import SIZES
from gpt.convert.formats import FORMATS, write_config
from tests.common.weights.foreign import GPT2, LLAMA, fill, gpt2, llama
from tests.helpers import gpt

HUGGING_FACE = {format.model_type: format for format in FORMATS.hugging_face}
TABLES = {name: format.table for name, format in HUGGING_FACE.items()} | {"t5x": FORMATS.t5x.table}


def read_with_remarks(values, tied=False, **change):
    return HUGGING_FACE[values["model_type"]].read_config(Settings(values | change, "config.json"), tied)


def read(values, tied=False, **change):
    return read_with_remarks(values, tied, **change)[0]


def test_every_field_of_gpt2_is_read():
    config = read(GPT2, tied=True)
    assert (config.vocab_size, config.max_positions, config.d_model, config.num_layers) == (41, 16, 12, 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.d_ff) == (3, 3, 4, 48)
    assert config.recipe == dataclasses.replace(GPT2_RECIPE, dropout=0.1)


def test_every_field_of_llama_is_read():
    config = read(LLAMA)
    assert (config.vocab_size, config.max_positions, config.d_model, config.num_layers) == (41, None, 12, 3)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.d_ff) == (6, 2, 4, 20)
    assert config.recipe == dataclasses.replace(LLAMA_RECIPE, norm_epsilon=1e-5, rope_theta=500000.0)


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({"rope_theta": 1e4, "rope_scaling": None}, 1e4),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, 7e5),
        ({"rope_theta": 3e4, "rope_scaling": {"type": "default"}}, 3e4),
        ({"rope_theta": None}, 1e4),
    ],
)
def test_rope_theta_of_old_and_new_configs(change, theta):
    assert read(LLAMA, **change).recipe.rope_theta == theta


def test_defaults_of_absent_fields():
    values = {name: value for name, value in LLAMA.items() if name not in ("head_dim", "num_key_value_heads")}
    config = read(values | {"hidden_size": 24})
    assert (config.num_kv_heads, config.head_dim) == (6, 4)
    assert read(GPT2 | {"n_inner": 30, "n_positions": None, "n_ctx": 9}).max_positions == 9


@pytest.mark.parametrize(
    ("values", "change", "named"),
    [
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        (GPT2, {"activation_function": "gelu"}, "activation_function is 'gelu'"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention"),
        (GPT2, {"n_head": 5}, "n_embd is 12, which n_head"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: rope_type is 'llama3'"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: type is 'linear'"),
        (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: rope_type is 'yarn'"),
        (LLAMA, {"attention_bias": True}, "attention_bias is True"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is True"),
        (LLAMA, {"sliding_window": 4096}, "sliding_window is 4096"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (LLAMA, {"model_type": "mistral"}, "model_type is 'mistral'"),
        (LLAMA, {"num_attention_heads": 7}, "num_kv_heads"),
        (LLAMA, {"intermediate_size": None}, "intermediate_size is missing"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(values, change, named):
    with pytest.raises(UserError, match=named):
        read(values, **change)


def test_one_of_several_dropout_rates_is_used_with_a_remark():
    config, remarks = read_with_remarks(GPT2, tied=True, resid_pdrop=0.2)
    assert config.recipe.dropout == 0.2
    assert "resid_pdrop's 0.2" in remarks[0]


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2s_table_has_every_key_with_its_shape(prefix):
    tensors = gpt2(prefix=prefix)
    table = TABLES["gpt2"](read(GPT2, tied=True), tensors)
    assert {key: tensor.shape for key, tensor in table.tensors().items()} == {k: v.shape for k, v in tensors.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_llamas_table_has_every_key_with_its_shape(tied):
    tensors = llama(LLAMA | {"tie_word_embeddings": tied})
    table = TABLES["llama"](read(LLAMA, tied=tied), tensors)
    assert {key: tensor.shape for key, tensor in table.tensors().items()} == {k: v.shape for k, v in tensors.items()}


@pytest.mark.parametrize("size", SIZES)
def test_tables_count_the_parameters_of_the_named_sizes(size):
    shapes = TABLES[size.partition("-")[0]](SIZES[size]).leaves().values()
    assert sum(map(math.prod, shapes)) == SIZES[size].param_count()


@pytest.mark.parametrize("size", [size for size in SIZES if not size.startswith("t5x")])
def test_a_written_config_reads_back(size):
    config = SIZES[size]
    assert read(write_config(config), tied=config.recipe.tied_embeddings) == config


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SIZES["t5x-decoder-base"], "model.recipe.positions"),
        (gpt(input_attention="bidirectional"), "model.input_attention"),
        (gpt(dataclasses.replace(LLAMA_RECIPE, qk_norm=True)), "model.recipe.qk_norm"),
        (gpt(dataclasses.replace(LLAMA_RECIPE, mlp="geglu")), "model.recipe.mlp"),
        (gpt(dataclasses.replace(LLAMA_RECIPE, biases=True)), "model.recipe.biases"),
        (gpt(dataclasses.replace(LLAMA_RECIPE, scale_logits=True)), "model.recipe.scale_logits"),
        (gpt(num_heads=6, num_kv_heads=6), "model.num_heads"),
        (gpt(GPT2_RECIPE, max_positions=8, num_kv_heads=2), "model.num_kv_heads"),
        (gpt(GPT2_RECIPE, max_positions=8, num_kv_heads=4, head_dim=16), "model.head_dim"),
        (gpt(dataclasses.replace(GPT2_RECIPE, mlp="swiglu"), max_positions=8), "model.recipe.mlp"),
        (gpt(dataclasses.replace(GPT2_RECIPE, norm="rmsnorm"), max_positions=8), "model.recipe.norm"),
    ],
)
def test_a_model_without_a_counterpart_names_the_field(config, field):
    with pytest.raises(UserError, match=field):
        write_config(config)


class InMemory:
    where = "folder"

    def __init__(self, tensors):
        self.tensors = tensors

    def read(self, name, start=0, stop=None):
        return self.tensors[name][start:stop] if self.tensors[name].ndim else self.tensors[name]


def test_gpt2s_constant_buffers_are_known_and_checked():
    table = TABLES["gpt2"](read(GPT2, tied=True))
    mask = np.tri(16, dtype=np.uint8)[None, None]
    names = {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": np.float32(-1e4)}
    assert set(match(table, InMemory(gpt2() | names)).extras) == set(names)
    assert all(table.extra(name).check(name, np.asarray(value)) is None for name, value in names.items())
    name = "transformer.h.0.attn.bias"
    assert "causal" in table.extra(name).check(name, mask * 0 + 1)
    assert "causal" in table.extra(name).check(name, mask[0])
    assert "negative" in table.extra("h.1.attn.masked_bias").check("", np.float32(0))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_llamas_frequencies_are_known_and_checked(dtype):
    table = TABLES["llama"](read(LLAMA))
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    right = np.array([500000.0 ** -(2 * i / 4) for i in range(2)]).astype(dtype)
    assert table.extra(name).check(name, right) is None
    wrong = np.array([10000.0 ** -(2 * i / 4) for i in range(2)]).astype(dtype)
    assert "rope_theta=500000" in table.extra(name).check(name, wrong)


def test_t5x_decoder_only_is_read_from_shapes():
    d, heads, size, f = 12, 5, 4, 20
    layer = {
        "pre_self_attention_layer_norm/scale": (d,),
        "pre_mlp_layer_norm/scale": (d,),
        **{f"self_attention/{name}/kernel": (d, heads * size) for name in ("query", "key", "value")},
        "self_attention/out/kernel": (heads * size, d),
        "mlp/wi_0/kernel": (d, f),
        "mlp/wi_1/kernel": (d, f),
        "mlp/wo/kernel": (f, d),
    }
    shapes = {"decoder/token_embedder/embedding": (40, d), "decoder/relpos_bias/rel_embedding": (heads, 32)}
    shapes |= {"decoder/decoder_norm/scale": (d,)}
    shapes |= {f"decoder/layers_{i}/{name}": shape for i in range(3) for name, shape in layer.items()}
    tensors = fill(shapes)
    assert FORMATS.t5x.fits(tensors)
    config, _ = FORMATS.t5x.read_config(tensors, "checkpoint")
    assert config.recipe == SIZES["t5x-decoder-base"].recipe
    assert (config.num_layers, config.num_heads, config.head_dim, config.d_ff) == (3, 5, 4, 20)
    table = FORMATS.t5x.table(config)
    assert {key: tensor.shape for key, tensor in table.tensors().items()} == shapes
    assert config.param_count() == sum(value.size for value in tensors.values())
