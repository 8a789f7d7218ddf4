"""Hugging Face's GPT-2. Key table from transformers' `modeling_gpt2.py`; Conv1D weights are (in, out).

Axes: V vocab, S positions, D model, H heads, G key-value heads, C head dim, F mlp.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from common.errors import UserError
from common.recipe import GPT2
from common.weights.formats import TANH_GELU, HuggingFaceFormat
from common.weights.mapping import Extra, LoadRule, Table
from common.weights.settings import Settings
from common.weights.text import native_text
from gpt.config import GptConfig
from gpt.convert.hugging_face import embedding_rules, make_table, require_network


def _table(config: GptConfig, names: Iterable[str] = ()) -> Table:
    return make_table(config, _rules(config), _BUFFERS, "transformer.", names)


def _rules(config: GptConfig) -> tuple[LoadRule, ...]:
    """Query, key and value lie side by side in `c_attn`."""
    layer = "transformer.h.{layer}."
    return (
        *embedding_rules(config, "transformer.wte.weight"),
        LoadRule("positions/table_SD", "transformer.wpe.weight", "S D"),
        LoadRule("layers/attention_norm/scale_D", f"{layer}ln_1.weight", "D"),
        LoadRule("layers/attention_norm/bias_D", f"{layer}ln_1.bias", "D"),
        LoadRule("layers/attention/query_DHC", f"{layer}attn.c_attn.weight", "D (H C)", part=0),
        LoadRule("layers/attention/key_DGC", f"{layer}attn.c_attn.weight", "D (G C)", part=1),
        LoadRule("layers/attention/value_DGC", f"{layer}attn.c_attn.weight", "D (G C)", part=2),
        LoadRule("layers/attention/query_bias_HC", f"{layer}attn.c_attn.bias", "(H C)", part=0),
        LoadRule("layers/attention/key_bias_GC", f"{layer}attn.c_attn.bias", "(G C)", part=1),
        LoadRule("layers/attention/value_bias_GC", f"{layer}attn.c_attn.bias", "(G C)", part=2),
        LoadRule("layers/attention/out_HCD", f"{layer}attn.c_proj.weight", "(H C) D"),
        LoadRule("layers/attention/out_bias_D", f"{layer}attn.c_proj.bias", "D"),
        LoadRule("layers/mlp_norm/scale_D", f"{layer}ln_2.weight", "D"),
        LoadRule("layers/mlp_norm/bias_D", f"{layer}ln_2.bias", "D"),
        LoadRule("layers/mlp/in_DF", f"{layer}mlp.c_fc.weight", "D F"),
        LoadRule("layers/mlp/in_bias_F", f"{layer}mlp.c_fc.bias", "F"),
        LoadRule("layers/mlp/out_FD", f"{layer}mlp.c_proj.weight", "F D"),
        LoadRule("layers/mlp/out_bias_D", f"{layer}mlp.c_proj.bias", "D"),
        LoadRule("final_norm/scale_D", "transformer.ln_f.weight", "D"),
        LoadRule("final_norm/bias_D", "transformer.ln_f.bias", "D"),
    )


def _check_causal_mask(name: str, value: np.ndarray) -> str | None:
    size = value.shape[-1]
    is_mask = value.shape == (1, 1, size, size) and np.array_equal(value[0, 0] != 0, np.tri(size, dtype=bool))
    return None if is_mask else "should be a causal mask"


def _check_masked_logit(name: str, value: np.ndarray) -> str | None:
    return None if value.size == 1 and float(value.reshape(())) <= -1e4 else "should be a large negative number"


_BUFFERS = (
    Extra(r"(transformer\.)?h\.\d+\.attn\.bias", _check_causal_mask),
    Extra(r"(transformer\.)?h\.\d+\.attn\.masked_bias", _check_masked_logit),
)
"""Constants that older checkpoints store."""


def _read_config(settings: Settings, tied: bool) -> tuple[GptConfig, list[str]]:
    settings.only("model_type", ["gpt2"], None)
    settings.only("scale_attn_by_inverse_layer_idx", [False], False)
    settings.only("add_cross_attention", [False], False)
    activation = settings.only("activation_function", [*TANH_GELU, "relu"], "gelu_new")
    d_model, num_heads = settings.integer("n_embd"), settings.integer("n_head")
    if d_model % num_heads:
        raise UserError(f"{settings.where}: n_embd is {d_model}, which n_head ({num_heads}) does not divide")
    rates = {name: settings.number(name, default=0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    recipe = dataclasses.replace(
        GPT2,
        mlp="relu" if activation == "relu" else "gelu",
        tied_embeddings=tied,
        scale_attention=settings.flag("scale_attn_weights", True),
        norm_epsilon=settings.number("layer_norm_epsilon", default=1e-5),
        dropout=rates["resid_pdrop"],
    )
    config = GptConfig(
        vocab_size=settings.integer("vocab_size"),
        num_layers=settings.integer("n_layer"),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=d_model // num_heads,
        d_ff=settings.integer("n_inner", default=4 * d_model),
        max_positions=settings.integer("n_positions", "n_ctx"),
        recipe=recipe,
    )
    if len(set(rates.values())) == 1:
        return config, []
    return config, [f"training has one dropout rate: resid_pdrop's {rates['resid_pdrop']:g} of {rates}"]


def write_config(config: GptConfig) -> dict[str, Any]:
    """config.json of the same network; raises UserError naming a field that GPT-2 does not have."""
    recipe = config.recipe
    require_network(config, like=GPT2, name="GPT-2", free=("mlp", "tied_embeddings", "scale_attention"))
    if recipe.mlp not in ("gelu", "relu"):
        raise UserError(f"model.recipe.mlp is {recipe.mlp!r}: GPT-2 has 'gelu' or 'relu'")
    heads = config.num_heads
    for field, value in (("num_kv_heads", heads), ("head_dim", config.d_model // heads)):
        if getattr(config, field) != value:
            raise UserError(f"model.{field} is {getattr(config, field)}: GPT-2's would be {value}")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": heads,
        "n_inner": config.d_ff,
        "activation_function": "relu" if recipe.mlp == "relu" else "gelu_new",
        "resid_pdrop": recipe.dropout,
        "embd_pdrop": recipe.dropout,
        "attn_pdrop": recipe.dropout,
        "layer_norm_epsilon": recipe.norm_epsilon,
        "scale_attn_weights": recipe.scale_attention,
        "tie_word_embeddings": recipe.tied_embeddings,
    }


FORMAT = HuggingFaceFormat(
    model_type="gpt2",
    embeddings=("transformer.wte.weight", "wte.weight"),
    wants_tied=lambda settings: settings.flag("tie_word_embeddings", True),
    read_config=_read_config,
    table=_table,
    read_text=functools.partial(native_text, bos=50256, eos=50256, adds_bos=False),
)
