"""T5X's encoder-decoder network (`examples/t5/network.py`).

Axes: V vocab, D model, H heads, R buckets.
"""

import functools
from collections.abc import Mapping

from common.errors import UserError
from common.weights.formats import T5XFormat, axis_sizes
from common.weights.mapping import LoadRule, Table, TensorInfo
from common.weights.t5x_network import attention_rules, count_layers, head_rules, matrix_shape, mlp_rules, read_recipe
from t5like.config import T5LikeConfig

_EMBEDDING = "token_embedder/embedding"


def _table(config: T5LikeConfig) -> Table:
    encoder, decoder = "encoder/layers_{layer}/", "decoder/layers_{layer}/"
    rules = (
        LoadRule("embedding/table_VD", _EMBEDDING, "V D"),
        LoadRule("encoder_bias/table_HR", "encoder/relpos_bias/rel_embedding", "H R"),
        LoadRule("decoder_bias/table_HR", "decoder/relpos_bias/rel_embedding", "H R"),
        LoadRule("encoder/attention_norm/scale_D", f"{encoder}pre_attention_layer_norm/scale", "D"),
        *attention_rules("encoder/attention", f"{encoder}attention"),
        LoadRule("encoder/mlp_norm/scale_D", f"{encoder}pre_mlp_layer_norm/scale", "D"),
        *mlp_rules("encoder/mlp", f"{encoder}mlp", config.recipe),
        LoadRule("encoder_norm/scale_D", "encoder/encoder_norm/scale", "D"),
        LoadRule("decoder/attention_norm/scale_D", f"{decoder}pre_self_attention_layer_norm/scale", "D"),
        *attention_rules("decoder/attention", f"{decoder}self_attention"),
        LoadRule("decoder/cross_norm/scale_D", f"{decoder}pre_cross_attention_layer_norm/scale", "D"),
        *attention_rules("decoder/cross_attention", f"{decoder}encoder_decoder_attention"),
        LoadRule("decoder/mlp_norm/scale_D", f"{decoder}pre_mlp_layer_norm/scale", "D"),
        *mlp_rules("decoder/mlp", f"{decoder}mlp", config.recipe),
        LoadRule("decoder_norm/scale_D", "decoder/decoder_norm/scale", "D"),
        *head_rules(config.recipe),
    )
    layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    return Table(rules=rules, sizes=axis_sizes(config, config.vocab_size), layers=layers)


def _read_config(tensors: Mapping[str, TensorInfo], where: str) -> tuple[T5LikeConfig, list[str]]:
    """The config that the shapes of a checkpoint imply, and what was assumed."""
    shape = functools.partial(matrix_shape, tensors, where)
    if "encoder/layers_0/relpos_bias/rel_embedding" in tensors:
        raise UserError(f"{where}: encoder/encoder/relpos_bias is one bias for each layer (umT5): T5 has one in all")
    vocab_size, d_model = shape(_EMBEDDING)
    num_heads, buckets = shape("encoder/relpos_bias/rel_embedding")
    recipe, assumed = read_recipe(tensors, "encoder", buckets)
    config = T5LikeConfig(
        vocab_size=vocab_size,
        encoder_layers=count_layers(tensors, "encoder", where),
        decoder_layers=count_layers(tensors, "decoder", where),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=shape("encoder/layers_0/attention/query/kernel")[-1] // num_heads,
        d_ff=shape("encoder/layers_0/mlp/wo/kernel")[0],
        recipe=recipe,
    )
    return config, assumed


FORMAT = T5XFormat(
    fits=lambda names: _EMBEDDING in names,
    read_config=_read_config,
    table=_table,
    text={"alignment": "start_token", "start_id": 0, "eos_ids": [1], "bos_id": None},
)
