"""Hugging Face's Llama. Key table from transformers' `modeling_llama.py`; Linear weights are (out, in).

RoPE rotates the two halves of a head, as here. Axes: V vocab, D model, H heads, G key-value heads, C head dim, F mlp.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from common.errors import UserError
from common.recipe import LLAMA
from common.weights.formats import HuggingFaceFormat
from common.weights.mapping import Extra, LoadRule, Table
from common.weights.settings import Settings
from common.weights.text import native_text
from gpt.config import GptConfig
from gpt.convert.hugging_face import embedding_rules, make_table, require_network

DEFAULT_POSITIONS = 2048
"""`max_position_embeddings` if the length of the training texts is not known; no weight depends on it."""


def _table(config: GptConfig, names: Iterable[str] = ()) -> Table:
    return make_table(config, _rules(config), _buffers(config), "model.", names)


def _rules(config: GptConfig) -> tuple[LoadRule, ...]:
    layer = "model.layers.{layer}."
    return (
        *embedding_rules(config, "model.embed_tokens.weight"),
        LoadRule("layers/attention_norm/scale_D", f"{layer}input_layernorm.weight", "D"),
        LoadRule("layers/attention/query_DHC", f"{layer}self_attn.q_proj.weight", "(H C) D"),
        LoadRule("layers/attention/key_DGC", f"{layer}self_attn.k_proj.weight", "(G C) D"),
        LoadRule("layers/attention/value_DGC", f"{layer}self_attn.v_proj.weight", "(G C) D"),
        LoadRule("layers/attention/out_HCD", f"{layer}self_attn.o_proj.weight", "D (H C)"),
        LoadRule("layers/mlp_norm/scale_D", f"{layer}post_attention_layernorm.weight", "D"),
        LoadRule("layers/mlp/in_DF", f"{layer}mlp.gate_proj.weight", "F D"),
        LoadRule("layers/mlp/linear_DF", f"{layer}mlp.up_proj.weight", "F D"),
        LoadRule("layers/mlp/out_FD", f"{layer}mlp.down_proj.weight", "D F"),
        LoadRule("final_norm/scale_D", "model.norm.weight", "D"),
    )


def _buffers(config: GptConfig) -> tuple[Extra, ...]:
    """RoPE's frequencies, which older checkpoints store."""
    frequencies = config.recipe.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)

    def check(name: str, value: np.ndarray) -> str | None:
        # Half precision keeps eight bits; with another rope_theta the error would be far larger.
        same = value.shape == frequencies.shape and np.allclose(value.astype(np.float64), frequencies, rtol=2**-7)
        return None if same else f"should be RoPE's frequencies for rope_theta={config.recipe.rope_theta:g}"

    return (Extra(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", check),)


def _read_config(settings: Settings, tied: bool) -> tuple[GptConfig, list[str]]:
    settings.only("model_type", ["llama"], None)
    settings.only("hidden_act", ["silu", "swish"], "silu")
    settings.only("attention_bias", [False, None], False)
    settings.only("mlp_bias", [False, None], False)
    settings.only("sliding_window", [None], None)
    settings.only("use_sliding_window", [False, None], False)
    settings.only("partial_rotary_factor", [None, 1.0], None)
    settings.only("attention_dropout", [0.0, None], 0.0)
    settings.only("quantization_config", [None], None)
    d_model, num_heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    recipe = dataclasses.replace(
        LLAMA,
        tied_embeddings=tied,
        norm_epsilon=settings.number("rms_norm_eps", default=1e-6),
        rope_theta=_rope_theta(settings),
    )
    config = GptConfig(
        vocab_size=settings.integer("vocab_size"),
        num_layers=settings.integer("num_hidden_layers"),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=settings.integer("num_key_value_heads", default=num_heads),
        head_dim=settings.integer("head_dim", default=d_model // num_heads),
        d_ff=settings.integer("intermediate_size"),
        recipe=recipe,
    )
    return config, []


def _rope_theta(settings: Settings) -> float:
    """Older configs have `rope_theta` and `rope_scaling`, newer ones `rope_parameters`."""
    theta = settings.number("rope_theta", default=LLAMA.rope_theta)
    for name in ("rope_scaling", "rope_parameters"):
        rope = settings.values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise settings.refusal(name, rope, "null or an object")
        inner = Settings(rope, f"{settings.where}: {name}")
        inner.only("rope_type", ["default"], inner.only("type", ["default"], "default"))
        inner.only("partial_rotary_factor", [None, 1.0], None)
        theta = inner.number("rope_theta", default=theta)
    return theta


def write_config(config: GptConfig, row_length: int | None) -> dict[str, Any]:
    """config.json of the same network, trained on texts of `row_length` tokens (None: not known).

    Raises UserError naming a field that Llama does not have.
    """
    recipe = config.recipe
    require_network(config, like=LLAMA, name="Llama", free=("tied_embeddings",))
    if config.d_model % config.num_heads:
        raise UserError(f"model.num_heads is {config.num_heads}: Llama needs a divisor of d_model ({config.d_model})")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": row_length or DEFAULT_POSITIONS,
        "rms_norm_eps": recipe.norm_epsilon,
        # Older and newer versions of Transformers read different names.
        "rope_theta": recipe.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": recipe.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": recipe.tied_embeddings,
    }


FORMAT = HuggingFaceFormat(
    model_type="llama",
    embeddings=("model.embed_tokens.weight", "embed_tokens.weight"),
    wants_tied=lambda settings: settings.flag("tie_word_embeddings", False),
    read_config=_read_config,
    table=_table,
    read_text=functools.partial(native_text, bos=1, eos=2, adds_bos=True),
)
