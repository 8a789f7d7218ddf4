"""T5X's decoder-only network (`examples/decoder_only/network.py`).

Axes: V vocab, D model, H heads, R buckets.
"""

import dataclasses
import functools
from collections.abc import Mapping

from common.weights.formats import T5XFormat, axis_sizes
from common.weights.mapping import LoadRule, Table, TensorInfo
from common.weights.t5x_network import attention_rules, count_layers, head_rules, matrix_shape, mlp_rules, read_recipe
from gpt.config import GptConfig

_ENCODER_DECODER = "token_embedder/embedding"
"""A parameter that only T5X's encoder-decoders have."""


def _table(config: GptConfig) -> Table:
    layer = "decoder/layers_{layer}/"
    rules = (
        LoadRule("embedding/table_VD", "decoder/token_embedder/embedding", "V D"),
        LoadRule("relative_bias/table_HR", "decoder/relpos_bias/rel_embedding", "H R"),
        LoadRule("layers/attention_norm/scale_D", f"{layer}pre_self_attention_layer_norm/scale", "D"),
        *attention_rules("layers/attention", f"{layer}self_attention"),
        LoadRule("layers/mlp_norm/scale_D", f"{layer}pre_mlp_layer_norm/scale", "D"),
        *mlp_rules("layers/mlp", f"{layer}mlp", config.recipe),
        LoadRule("final_norm/scale_D", "decoder/decoder_norm/scale", "D"),
        *head_rules(config.recipe),
    )
    return Table(rules=rules, sizes=axis_sizes(config, config.vocab_size), layers={"layers": config.num_layers})


def _read_config(tensors: Mapping[str, TensorInfo], where: str) -> tuple[GptConfig, list[str]]:
    """The config that the shapes of a checkpoint imply, and what was assumed."""
    shape = functools.partial(matrix_shape, tensors, where)
    vocab_size, d_model = shape("decoder/token_embedder/embedding")
    num_heads, buckets = shape("decoder/relpos_bias/rel_embedding")
    recipe, assumed = read_recipe(tensors, "decoder", buckets)
    config = GptConfig(
        vocab_size=vocab_size,
        num_layers=count_layers(tensors, "decoder", where),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=shape("decoder/layers_0/self_attention/query/kernel")[-1] // num_heads,
        d_ff=shape("decoder/layers_0/mlp/wo/kernel")[0],
        recipe=dataclasses.replace(recipe, relative_sides="one"),
    )
    return config, assumed


FORMAT = T5XFormat(
    fits=lambda names: _ENCODER_DECODER not in names,
    read_config=_read_config,
    table=_table,
    text={"alignment": "native", "start_id": 0, "eos_ids": [1], "bos_id": 0},
)
