"""Checkpoints of encoder-decoders: Hugging Face's T5 (v1.0, v1.1, FLAN, mT5) and T5X's.

Key tables from transformers' `modeling_t5.py` and T5X's `examples/t5/network.py`.
Axes: V vocab, D model, H heads, G key-value heads, C head dim, F mlp, R buckets.

Tied or not, scaled or not. Transformers 5 shares one table between `shared`, both `embed_tokens` and `lm_head` whatever
`tie_word_embeddings` says, unless the file holds an `lm_head.weight` with other values; the config's flag only decides
whether hidden states are divided by sqrt(d_model) before the head (and `scale_decoder_outputs`, where a config has it,
overrules the flag; mT5 never divides). So the file says whether embeddings are tied, and the config whether logits are
scaled: v1.0 is tied and scaled; v1.1, FLAN and mT5 are neither.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from common.errors import UserError
from common.nn.recipe import T5_V1_0, T5_V1_1, Recipe
from common.weights.mapping import Extra, LoadRule, Table, TensorInfo
from common.weights.settings import Settings, shown
from common.weights.t5x_shapes import count_layers, matrix_shape
from t5like.config import T5LikeConfig

Format = Literal["t5", "mt5", "t5x"]
HUGGING_FACE = ("t5", "mt5")
HEAD = "lm_head.weight"
EMBEDDING = "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
SENTINELS = {"t5": 100, "mt5": 0}
"""Extra ids on top of the SentencePiece model, where a folder does not say; mT5's pieces hold them already."""
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
MLPS: dict[tuple[bool, str], Literal["relu", "gelu", "geglu", "swiglu"]] = {
    (False, "relu"): "relu",
    **{(False, name): "gelu" for name in TANH_GELU},
    **{(True, name): "geglu" for name in TANH_GELU},
    (True, "silu"): "swiglu",
}
"""By (gated, activation)."""
_FEED_FORWARD = {"relu": "relu", "gelu": "gelu_new", "geglu": "gated-gelu", "swiglu": "gated-silu"}

# Key tables.


def table(config: T5LikeConfig, format: Format) -> Table:
    """The keys of that format, which has all four pieces of structure: see `write_config`."""
    rules = _t5x(config) if format == "t5x" else _hugging_face(config)
    sizes = {
        "V": config.vocab_size,
        "D": config.d_model,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "C": config.head_dim,
        "F": config.d_ff,
        "R": config.recipe.relative_buckets,
    }
    layers = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    # Early T5 folders hold a bias of cross-attention that no network reads.
    unused = Extra(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")
    return Table(rules=rules, sizes=sizes, layers=layers, extras=() if format == "t5x" else (unused,))


def _hugging_face(config: T5LikeConfig) -> tuple[LoadRule, ...]:
    """Linear weights are (out, in)."""
    tied = config.recipe.tied_embeddings
    head = () if tied else (LoadRule("output/weight_DV", HEAD, "V D"),)
    encoder, decoder = "encoder.block.{layer}.layer.", "decoder.block.{layer}.layer."
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        LoadRule("embedding/table_VD", EMBEDDING, "V D", aliases=(*COPIES, HEAD) if tied else COPIES),
        LoadRule("encoder_bias/table_HR", f"encoder.block.0.{bias}", "R H"),
        LoadRule("decoder_bias/table_HR", f"decoder.block.0.{bias}", "R H"),
        LoadRule("encoder/attention_norm/scale_D", f"{encoder}0.layer_norm.weight", "D"),
        *_attention("encoder/attention", f"{encoder}0.SelfAttention."),
        LoadRule("encoder/mlp_norm/scale_D", f"{encoder}1.layer_norm.weight", "D"),
        *_mlp(config, "encoder/mlp", f"{encoder}1.DenseReluDense."),
        LoadRule("encoder_norm/scale_D", "encoder.final_layer_norm.weight", "D"),
        LoadRule("decoder/attention_norm/scale_D", f"{decoder}0.layer_norm.weight", "D"),
        *_attention("decoder/attention", f"{decoder}0.SelfAttention."),
        LoadRule("decoder/cross_norm/scale_D", f"{decoder}1.layer_norm.weight", "D"),
        *_attention("decoder/cross_attention", f"{decoder}1.EncDecAttention."),
        LoadRule("decoder/mlp_norm/scale_D", f"{decoder}2.layer_norm.weight", "D"),
        *_mlp(config, "decoder/mlp", f"{decoder}2.DenseReluDense."),
        LoadRule("decoder_norm/scale_D", "decoder.final_layer_norm.weight", "D"),
        *head,
    )


def _attention(ours: str, theirs: str) -> tuple[LoadRule, ...]:
    return (
        LoadRule(f"{ours}/query_DHC", f"{theirs}q.weight", "(H C) D"),
        LoadRule(f"{ours}/key_DGC", f"{theirs}k.weight", "(G C) D"),
        LoadRule(f"{ours}/value_DGC", f"{theirs}v.weight", "(G C) D"),
        LoadRule(f"{ours}/out_HCD", f"{theirs}o.weight", "D (H C)"),
    )


def _mlp(config: T5LikeConfig, ours: str, theirs: str) -> tuple[LoadRule, ...]:
    gated = config.recipe.gated_mlp
    linear = (LoadRule(f"{ours}/linear_DF", f"{theirs}wi_1.weight", "F D"),) if gated else ()
    return (
        LoadRule(f"{ours}/in_DF", f"{theirs}{'wi_0' if gated else 'wi'}.weight", "F D"),
        *linear,
        LoadRule(f"{ours}/out_FD", f"{theirs}wo.weight", "D F"),
    )


def _t5x(config: T5LikeConfig) -> tuple[LoadRule, ...]:
    """Kernels are (in, out), heads merged."""
    tied = config.recipe.tied_embeddings
    head = () if tied else (LoadRule("output/weight_DV", "decoder/logits_dense/kernel", "D V"),)
    encoder, decoder = "encoder/layers_{layer}/", "decoder/layers_{layer}/"
    return (
        LoadRule("embedding/table_VD", "token_embedder/embedding", "V D"),
        LoadRule("encoder_bias/table_HR", "encoder/relpos_bias/rel_embedding", "H R"),
        LoadRule("decoder_bias/table_HR", "decoder/relpos_bias/rel_embedding", "H R"),
        LoadRule("encoder/attention_norm/scale_D", f"{encoder}pre_attention_layer_norm/scale", "D"),
        *_t5x_attention("encoder/attention", f"{encoder}attention"),
        LoadRule("encoder/mlp_norm/scale_D", f"{encoder}pre_mlp_layer_norm/scale", "D"),
        *_t5x_mlp(config, "encoder/mlp", f"{encoder}mlp"),
        LoadRule("encoder_norm/scale_D", "encoder/encoder_norm/scale", "D"),
        LoadRule("decoder/attention_norm/scale_D", f"{decoder}pre_self_attention_layer_norm/scale", "D"),
        *_t5x_attention("decoder/attention", f"{decoder}self_attention"),
        LoadRule("decoder/cross_norm/scale_D", f"{decoder}pre_cross_attention_layer_norm/scale", "D"),
        *_t5x_attention("decoder/cross_attention", f"{decoder}encoder_decoder_attention"),
        LoadRule("decoder/mlp_norm/scale_D", f"{decoder}pre_mlp_layer_norm/scale", "D"),
        *_t5x_mlp(config, "decoder/mlp", f"{decoder}mlp"),
        LoadRule("decoder_norm/scale_D", "decoder/decoder_norm/scale", "D"),
        *head,
    )


def _t5x_attention(ours: str, theirs: str) -> tuple[LoadRule, ...]:
    return (
        LoadRule(f"{ours}/query_DHC", f"{theirs}/query/kernel", "D (H C)"),
        LoadRule(f"{ours}/key_DGC", f"{theirs}/key/kernel", "D (G C)"),
        LoadRule(f"{ours}/value_DGC", f"{theirs}/value/kernel", "D (G C)"),
        LoadRule(f"{ours}/out_HCD", f"{theirs}/out/kernel", "(H C) D"),
    )


def _t5x_mlp(config: T5LikeConfig, ours: str, theirs: str) -> tuple[LoadRule, ...]:
    gated = config.recipe.gated_mlp
    linear = (LoadRule(f"{ours}/linear_DF", f"{theirs}/wi_1/kernel", "D F"),) if gated else ()
    return (
        LoadRule(f"{ours}/in_DF", f"{theirs}/{'wi_0' if gated else 'wi'}/kernel", "D F"),
        *linear,
        LoadRule(f"{ours}/out_FD", f"{theirs}/wo/kernel", "F D"),
    )


# config.json.


def read_config(values: Mapping[str, Any], where: str, *, tied: bool) -> T5LikeConfig:
    """The config that a config.json of `model_type` t5 or mt5 describes.

    `tied`: whether the file's head is its token table. Raises UserError naming a field that is missing or unsupported.
    """
    settings = Settings(values, where)
    model_type = settings.only("model_type", HUGGING_FACE, None)
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
    return T5LikeConfig(
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


def _scales_logits(settings: Settings) -> bool:
    return settings.flag("scale_decoder_outputs", settings.flag("tie_word_embeddings", True))


def _read_mlp(settings: Settings, default: str) -> Literal["relu", "gelu", "geglu", "swiglu"]:
    """`feed_forward_proj` is what people write; `dense_act_fn` and `is_gated_act`, where stored, overrule it."""
    proj = settings.text("feed_forward_proj", default=default)
    gate, _, name = proj.rpartition("-")
    if gate not in ("", "gated"):
        raise settings.refusal("feed_forward_proj", proj, ", ".join(_FEED_FORWARD.values()))
    activation = settings.text("dense_act_fn", default="gelu_new" if proj == "gated-gelu" else name)
    gated = settings.flag("is_gated_act", gate == "gated")
    if (gated, activation) not in MLPS:
        fields = {name: settings.values.get(name) for name in ("feed_forward_proj", "is_gated_act", "dense_act_fn")}
        stated = ", ".join(f"{name} is {shown(value)}" for name, value in fields.items() if value is not None)
        raise UserError(
            f"{settings.where}: {stated}, which is not supported; supported: {', '.join(_FEED_FORWARD.values())}"
        )
    return MLPS[gated, activation]


_NUMBERS = ("init", "dropout", "z_loss", "norm_epsilon", "rope_theta", "relative_buckets", "relative_max_distance")
"""Recipe fields that say how to train, or that are numbers a config.json takes or a T5 does not read."""
_SWITCHES = ("cross_attention", "parameters", "memory", "input_attention")


def write_config(config: T5LikeConfig) -> dict[str, Any]:
    """A config.json from which Hugging Face Transformers builds the same network.

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
    for field in dataclasses.fields(Recipe):
        value, theirs = getattr(recipe, field.name), getattr(T5_V1_0, field.name)
        free = ("mlp", "tied_embeddings", "scale_logits", *_NUMBERS)
        if field.name not in free and value != theirs:
            raise UserError(f"model.recipe.{field.name} is {value!r}: T5 has {theirs!r}")
    if recipe.scale_logits and not recipe.tied_embeddings:
        raise UserError(
            "model.recipe.scale_logits is True without tied_embeddings: T5 scales where embeddings are tied"
        )
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


# T5X.


def read_t5x(tensors: Mapping[str, TensorInfo], where: str) -> tuple[T5LikeConfig, list[str]]:
    """The config that the shapes of a T5 checkpoint tell, and what had to be assumed."""

    shape = functools.partial(matrix_shape, tensors, where)

    if "encoder/layers_0/relpos_bias/rel_embedding" in tensors:
        raise UserError(f"{where}: encoder/encoder/relpos_bias is one bias for each layer (umT5): T5 has one in all")
    vocab_size, d_model = shape("token_embedder/embedding")
    num_heads, buckets = shape("encoder/relpos_bias/rel_embedding")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in tensors
    tied = "decoder/logits_dense/kernel" not in tensors
    recipe = dataclasses.replace(
        T5_V1_1,
        mlp="geglu" if gated else "relu",
        tied_embeddings=tied,
        scale_logits=tied,
        relative_buckets=buckets,
    )
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
    return config, [f"assumed, since shapes do not tell: {recipe.mlp}, distances up to {recipe.relative_max_distance}"]
