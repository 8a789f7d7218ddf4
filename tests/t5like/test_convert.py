import dataclasses
import math

import numpy as np
import pytest

from common.errors import UserError
from common.recipe import T5_V1_0
from common.weights.settings import Settings
from t5like.config import SIZES
from t5like.convert.formats import FORMATS
from tests.common.weights.foreign import T5, T5_V1_1, t5, t5x
from tests.helpers import t5like

HUGGING_FACE = {format.model_type: format for format in FORMATS.hugging_face}


def read_config(values, tied=True):
    format = HUGGING_FACE.get(values["model_type"], HUGGING_FACE["t5"])
    return format.read_config(Settings(values, "config.json"), tied)[0]


def read(tied=True, **change):
    return read_config(T5 | change, tied)


def test_every_field_is_read():
    config = read()
    assert (config.vocab_size, config.d_model, config.head_dim, config.num_heads, config.d_ff) == (40, 12, 4, 5, 20)
    assert (config.encoder_layers, config.decoder_layers, config.num_kv_heads) == (2, 3, 5)
    recipe = config.recipe
    assert (recipe.relative_buckets, recipe.relative_max_distance, recipe.dropout) == (8, 20, 0.0)
    assert (recipe.mlp, recipe.tied_embeddings, recipe.scale_logits, recipe.scale_attention) == (
        "relu",
        True,
        True,
        False,
    )


@pytest.mark.parametrize(
    ("change", "mlp"),
    [
        ({"feed_forward_proj": "relu"}, "relu"),
        ({"feed_forward_proj": "gated-gelu"}, "geglu"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True}, "geglu"),
        ({"feed_forward_proj": "gated-gelu_new"}, "geglu"),
        ({"feed_forward_proj": "gated-silu"}, "swiglu"),
        ({"feed_forward_proj": "gelu_new"}, "gelu"),
    ],
)
def test_mlp_variants(change, mlp):
    assert read(**change).recipe.mlp == mlp


@pytest.mark.parametrize(
    ("change", "scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"model_type": "mt5", "tie_word_embeddings": True}, False),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_config_scales_and_the_file_ties(change, scaled, tied):
    recipe = read(tied=tied, **change).recipe
    assert (recipe.scale_logits, recipe.tied_embeddings) == (scaled, tied)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj is 'gated-tanh'"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj is 'gelu'"),
        ({"feed_forward_proj": "mixed-gelu"}, "feed_forward_proj is 'mixed-gelu'"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'"),
        ({"is_gated_act": True}, "feed_forward_proj is 'relu', is_gated_act is True"),
        ({"is_gated_act": True, "feed_forward_proj": None}, "json: is_gated_act is True"),
        ({"is_encoder_decoder": False}, "is_encoder_decoder is False"),
        ({"model_type": "umt5"}, "model_type is 'umt5'"),
        ({"d_model": None}, "d_model is missing"),
        ({"d_model": "12"}, "d_model is '12'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_an_unsupported_field_is_refused_by_name(change, named):
    with pytest.raises(UserError, match=named):
        read(**change)


@pytest.mark.parametrize("values", [T5, T5_V1_1])
def test_the_table_has_every_key_with_its_shape(values):
    tied = values is T5
    table = HUGGING_FACE["t5"].table(read_config(values, tied), ())
    assert {key: tensor.shape for key, tensor in table.tensors().items()} == {k: v.shape for k, v in t5(values).items()}


@pytest.mark.parametrize(("tied", "gated"), [(True, False), (False, True)])
def test_sizes_are_read_from_t5x_shapes(tied, gated):
    tensors = t5x(tied=tied, gated=gated)
    assert FORMATS.t5x.fits(tensors)
    config, assumed = FORMATS.t5x.read_config(tensors, "checkpoint")
    assert (config.vocab_size, config.d_model, config.num_heads, config.head_dim, config.d_ff) == (40, 12, 5, 4, 20)
    assert (config.encoder_layers, config.decoder_layers, config.recipe.relative_buckets) == (2, 3, 8)
    assert (config.recipe.tied_embeddings, config.recipe.scale_logits, config.recipe.mlp) == (
        tied,
        tied,
        "geglu" if gated else "relu",
    )
    assert "assumed" in assumed[0]
    table = FORMATS.t5x.table(config)
    assert {key: tensor.shape for key, tensor in table.tensors().items()} == {k: v.shape for k, v in tensors.items()}
    assert config.param_count() == sum(value.size for value in tensors.values())


def test_a_bias_for_each_layer_is_refused():
    tensors = t5x(tied=True, gated=True) | {"encoder/layers_0/relpos_bias/rel_embedding": np.zeros((5, 8))}
    with pytest.raises(UserError, match="one bias for each layer"):
        FORMATS.t5x.read_config(tensors, "checkpoint")


@pytest.mark.parametrize("size", SIZES)
def test_tables_count_the_parameters_of_the_named_sizes(size):
    for table in (HUGGING_FACE["t5"].table(SIZES[size], ()), FORMATS.t5x.table(SIZES[size])):
        assert sum(map(math.prod, table.leaves().values())) == SIZES[size].param_count()


@pytest.mark.parametrize("size", SIZES)
def test_a_written_config_reads_back(size):
    config = SIZES[size]
    back = read_config(FORMATS.write_config(config, None), config.recipe.tied_embeddings)
    recipe = dataclasses.replace(back.recipe, z_loss=config.recipe.z_loss)
    assert dataclasses.replace(back, recipe=recipe) == config


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cross_attention": "merged"}, "model.cross_attention"),
        ({"parameters": "shared", "encoder_layers": 2}, "model.parameters"),
        ({"memory": "layerwise", "encoder_layers": 2}, "model.memory"),
        ({"input_attention": "causal"}, "model.input_attention"),
        ({"num_kv_heads": 2}, "model.num_kv_heads"),
        ({"recipe": {"positions": "rope"}}, "model.recipe.positions"),
        ({"recipe": {"qk_norm": True}}, "model.recipe.qk_norm"),
        ({"recipe": {"scale_embeddings": True}}, "model.recipe.scale_embeddings"),
        ({"recipe": {"relative_sides": "one"}}, "model.recipe.relative_sides"),
        ({"recipe": {"biases": True}}, "model.recipe.biases"),
        ({"recipe": {"tied_embeddings": False}}, "model.recipe.scale_logits"),
    ],
)
def test_a_model_without_a_counterpart_names_the_field(change, field):
    recipe = dataclasses.replace(T5_V1_0, **change.get("recipe", {}))
    with pytest.raises(UserError, match=field):
        FORMATS.write_config(t5like(**{"num_kv_heads": 4, **change, "recipe": recipe}), None)
