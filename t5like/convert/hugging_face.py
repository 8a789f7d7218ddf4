"""Hugging Face's T5 (v1.0, v1.1, FLAN) and mT5. Key table from transformers' `modeling_t5.py`; Linear is (out, in).

The tensors decide whether embeddings are tied, and config.json whether logits are scaled. Transformers 5 uses one table
for `shared`, both `embed_tokens` and `lm_head`, whatever `tie_word_embeddings` is, unless the file has an
`lm_head.weight` with other values. The flag decides only whether hidden states are divided by sqrt(d_model) before the
head; `scale_decoder_outputs`, if present, overrides it, and mT5 never divides. So v1.0 is tied and scaled; v1.1, FLAN
and mT5 are neither.

Axes: V vocab, D model, H heads, G key-value heads, C head dim, F mlp, R buckets.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, Literal

from common.errors import UserError
from common.recipe import T5_V1_0
from common.weights.formats import HEAD, TANH_GELU, HuggingFaceFormat, axis_sizes, require_recipe
from common.weights.mapping import Extra, LoadRule, Table
from common.weights.settings import Settings, shown
from common.weights.text import start_token_text
from t5like.config import T5LikeConfig

_EMBEDDING = "shared.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

Mlp = Literal["relu", "gelu", "geglu", "swiglu"]
_MLPS: dict[tuple[bool, str], Mlp] = {
    (False, "relu"): "relu",
    **{(False, name): "gelu" for name in TANH_GELU},
    **{(True, name): "geglu" for name in TANH_GELU},
    (True, "silu"): "swiglu",
}
"""By (gated, activation)."""
_FEED_FORWARD = {"relu": "relu", "gelu": "gelu_new", "geglu": "gated-gelu", "swiglu": "gated-silu"}
"""Our names of MLPs, and T5's `feed_forward_proj`."""


def _table(config: T5LikeConfig, names: Iterable[str] = ()) -> Table:
    # Early T5 folders store a cross-attention bias that the network does not read.
    unused = Extra(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
    layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    return Table(rules=_rules(config), sizes=axis_sizes(config, config.vocab_size), layers=layers, extras=(unused,))


def _rules(config: T5LikeConfig) -> tuple[LoadRule, ...]:
    tied = config.recipe.tied_embeddings
    head = () if tied else (LoadRule("output/weight_DV", HEAD, "V D"),)
    encoder, decoder = "encoder.block.{layer}.layer.", "decoder.block.{layer}.layer."
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        LoadRule("embedding/table_VD", _EMBEDDING, "V D", aliases=(*_COPIES, HEAD) if tied else _COPIES),
        LoadRule("encoder_bias/table_HR", f"encoder.block.0.{bias}", "R H"),
        LoadRule("decoder_bias/table_HR", f"decoder.block.0.{bias}", "R H"),
        LoadRule("encoder/attention_norm/scale_D", f"{encoder}0.layer_norm.weight", "D"),
        *_attention_rules("encoder/attention", f"{encoder}0.SelfAttention."),
        LoadRule("encoder/mlp_norm/scale_D", f"{encoder}1.layer_norm.weight", "D"),
        *_mlp_rules("encoder/mlp", f"{encoder}1.DenseReluDense.", gated=config.recipe.gated_mlp),
        LoadRule("encoder_norm/scale_D", "encoder.final_layer_norm.weight", "D"),
        LoadRule("decoder/attention_norm/scale_D", f"{decoder}0.layer_norm.weight", "D"),
        *_attention_rules("decoder/attention", f"{decoder}0.SelfAttention."),
        LoadRule("decoder/cross_norm/scale_D", f"{decoder}1.layer_norm.weight", "D"),
        *_attention_rules("decoder/cross_attention", f"{decoder}1.EncDecAttention."),
        LoadRule("decoder/mlp_norm/scale_D", f"{decoder}2.layer_norm.weight", "D"),
        *_mlp_rules("decoder/mlp", f"{decoder}2.DenseReluDense.", gated=config.recipe.gated_mlp),
        LoadRule("decoder_norm/scale_D", "decoder.final_layer_norm.weight", "D"),
        *head,
    )


def _attention_rules(leaf: str, key: str) -> tuple[LoadRule, ...]:
    return (
        LoadRule(f"{leaf}/query_DHC", f"{key}q.weight", "(H C) D"),
        LoadRule(f"{leaf}/key_DGC", f"{key}k.weight", "(G C) D"),
        LoadRule(f"{leaf}/value_DGC", f"{key}v.weight", "(G C) D"),
        LoadRule(f"{leaf}/out_HCD", f"{key}o.weight", "D (H C)"),
    )


def _mlp_rules(leaf: str, key: str, *, gated: bool) -> tuple[LoadRule, ...]:
    linear = (LoadRule(f"{leaf}/linear_DF", f"{key}wi_1.weight", "F D"),) if gated else ()
    return (
        LoadRule(f"{leaf}/in_DF", f"{key}{'wi_0' if gated else 'wi'}.weight", "F D"),
        *linear,
        LoadRule(f"{leaf}/out_FD", f"{key}wo.weight", "D F"),
    )


def _read_config(settings: Settings, tied: bool, model_type: str) -> tuple[T5LikeConfig, list[str]]:
    settings.only("model_type", [model_type], None)
    settings.only("is_encoder_decoder", [True], True)
    settings.only("is_decoder", [False], False)
    settings.only("quantization_config", [None], None)
    num_heads, layers = settings.integer("num_heads"), settings.integer("num_layers")
    recipe = dataclasses.replace(
        T5_V1_0,
        mlp=_read_mlp(settings, "relu" if model_type == "t5" else "gated-gelu"),
        tied_embeddings=tied,
        scale_logits=model_type == "t5" and _scales_logits(settings),
        dropout=settings.number("dropout_rate", default=0.1),
        z_loss=0.0,
        norm_epsilon=settings.number("layer_norm_epsilon", default=1e-6),
        relative_buckets=settings.integer("relative_attention_num_buckets", default=32),
        relative_max_distance=settings.integer("relative_attention_max_distance", default=128),
    )
    config = T5LikeConfig(
        vocab_size=settings.integer("vocab_size"),
        encoder_layers=layers,
        decoder_layers=settings.integer("num_decoder_layers", default=layers),
        d_model=settings.integer("d_model"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=settings.integer("d_kv"),
        d_ff=settings.integer("d_ff"),
        recipe=recipe,
    )
    return config, []


def _scales_logits(settings: Settings) -> bool:
    return settings.flag("scale_decoder_outputs", settings.flag("tie_word_embeddings", True))


def _read_mlp(settings: Settings, default: str) -> Mlp:
    """The MLP that `feed_forward_proj` names; `dense_act_fn` and `is_gated_act`, if present, override it."""
    proj = settings.text("feed_forward_proj", default=default)
    gate, _, name = proj.rpartition("-")
    if gate not in ("", "gated"):
        raise settings.refusal("feed_forward_proj", proj, ", ".join(_FEED_FORWARD.values()))
    activation = settings.text("dense_act_fn", default="gelu_new" if proj == "gated-gelu" else name)
    gated = settings.flag("is_gated_act", gate == "gated")
    if (gated, activation) not in _MLPS:
        fields = {name: settings.values.get(name) for name in ("feed_forward_proj", "is_gated_act", "dense_act_fn")}
        stated = ", ".join(f"{name} is {shown(value)}" for name, value in fields.items() if value is not None)
        raise UserError(
            f"{settings.where}: {stated}, which is not supported; supported: {', '.join(_FEED_FORWARD.values())}"
        )
    return _MLPS[gated, activation]


_SWITCHES = ("cross_attention", "parameters", "memory", "input_attention")


def write_config(config: T5LikeConfig, row_length: int | None = None) -> dict[str, Any]:
    """A config.json from which Hugging Face Transformers builds the same network.

    `row_length` makes no difference: T5 has no longest text.

    Raises:
        UserError: naming a field that T5 does not have.
    """
    recipe = config.recipe
    defaults = {field.name: field.default for field in dataclasses.fields(T5LikeConfig)}
    for switch in _SWITCHES:
        if getattr(config, switch) != defaults[switch]:
            raise UserError(f"model.{switch} is {getattr(config, switch)!r}: T5 has {defaults[switch]!r}")
    if config.num_kv_heads != config.num_heads:
        raise UserError(f"model.num_kv_heads is {config.num_kv_heads}: T5 has as many as num_heads, {config.num_heads}")
    require_recipe(recipe, T5_V1_0, "T5", ("mlp", "tied_embeddings", "scale_logits"))
    if recipe.scale_logits and not recipe.tied_embeddings:
        raise UserError("model.recipe.scale_logits is True without tied_embeddings: T5 scales only tied embeddings")
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.head_dim,
        "d_ff": config.d_ff,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": recipe.relative_buckets,
        "relative_attention_max_distance": recipe.relative_max_distance,
        "dropout_rate": recipe.dropout,
        "layer_norm_epsilon": recipe.norm_epsilon,
        "feed_forward_proj": _FEED_FORWARD[recipe.mlp],
        "tie_word_embeddings": recipe.scale_logits,
    }


def _format(model_type: str, *, sentinels: int) -> HuggingFaceFormat:
    return HuggingFaceFormat(
        model_type=model_type,
        embeddings=(_EMBEDDING, *_COPIES),
        read_config=functools.partial(_read_config, model_type=model_type),
        table=_table,
        read_text=functools.partial(start_token_text, sentinels=sentinels),
    )


T5 = _format("t5", sentinels=100)
MT5 = _format("mt5", sentinels=0)
"""mT5's SentencePiece model contains the sentinels."""
