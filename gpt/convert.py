"""Checkpoints of decoder-only models: Hugging Face's GPT-2 and Llama, T5X's decoder_only.

Key tables from transformers' `modeling_gpt2.py` and `modeling_llama.py`, and T5X's `examples/decoder_only/network.py`.
Axes: V vocab, S positions, D model, H heads, G key-value heads, C head dim, F mlp, R buckets.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from common.errors import UserError
from common.nn.recipe import GPT2, LLAMA, T5_V1_1, Recipe
from common.weights.mapping import Extra, LoadRule, Table, TensorInfo
from common.weights.settings import Settings
from common.weights.t5x_shapes import count_layers, matrix_shape
from gpt.config import GptConfig

Format = Literal["gpt2", "llama", "t5x"]
HUGGING_FACE = ("gpt2", "llama")
HEAD = "lm_head.weight"
EMBEDDING = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}
PREFIX = {"gpt2": "transformer.", "llama": "model."}
"""Which names a headless model (GPT2Model, LlamaModel) stores without."""
TEXT: dict[str, dict[str, Any]] = {
    "gpt2": {"bos": 50256, "eos": 50256, "adds_bos": False},
    "llama": {"bos": 1, "eos": 2, "adds_bos": True},
}
"""Special ids, where a folder does not say."""
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
LLAMA_POSITIONS = 2048
"""What a Llama's config says of its context where nothing else is known; no weight depends on it."""

# Key tables.


def table(config: GptConfig, format: Format, names: Iterable[str] = ()) -> Table:
    """The keys of that format; `names`, those of a checkpoint, tell whether they have the usual prefix."""
    rules = {"gpt2": _gpt2, "llama": _llama, "t5x": _t5x}[format](config)
    extras = {"gpt2": _GPT2_BUFFERS, "llama": (_rotary_buffer(config),), "t5x": ()}[format]
    whole = Table(rules=rules, sizes=_sizes(config), layers={"layers": config.num_layers}, extras=extras)
    names = list(names)
    prefix = PREFIX.get(format, "")
    headless = bool(names) and not any(name.startswith(prefix) for name in names)
    return whole.without_prefix(prefix) if headless else whole


def _sizes(config: GptConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "S": config.max_positions or 0,
        "D": config.d_model,
        "H": config.num_heads,
        "G": config.num_kv_heads,
        "C": config.head_dim,
        "F": config.d_ff,
        "R": config.recipe.relative_buckets,
    }


def _gpt2(config: GptConfig) -> tuple[LoadRule, ...]:
    """Conv1D weights are (in, out), query, key and value side by side."""
    layer = "transformer.h.{layer}."
    return (
        *_head(config, EMBEDDING["gpt2"]),
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


def _llama(config: GptConfig) -> tuple[LoadRule, ...]:
    """Linear weights are (out, in); RoPE turns the halves of a head, as ours does."""
    layer = "model.layers.{layer}."
    return (
        *_head(config, EMBEDDING["llama"]),
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


def _head(config: GptConfig, embedding: str) -> tuple[LoadRule, ...]:
    if config.recipe.tied_embeddings:
        return (LoadRule("embedding/table_VD", embedding, "V D", aliases=(HEAD,)),)
    return (LoadRule("embedding/table_VD", embedding, "V D"), LoadRule("output/weight_DV", HEAD, "V D"))


def _t5x(config: GptConfig) -> tuple[LoadRule, ...]:
    """Kernels are (in, out), heads merged."""
    layer = "decoder/layers_{layer}/"
    gated = config.recipe.gated_mlp
    head = (
        () if config.recipe.tied_embeddings else (LoadRule("output/weight_DV", "decoder/logits_dense/kernel", "D V"),)
    )
    linear = (LoadRule("layers/mlp/linear_DF", f"{layer}mlp/wi_1/kernel", "D F"),) if gated else ()
    return (
        LoadRule("embedding/table_VD", "decoder/token_embedder/embedding", "V D"),
        LoadRule("relative_bias/table_HR", "decoder/relpos_bias/rel_embedding", "H R"),
        LoadRule("layers/attention_norm/scale_D", f"{layer}pre_self_attention_layer_norm/scale", "D"),
        LoadRule("layers/attention/query_DHC", f"{layer}self_attention/query/kernel", "D (H C)"),
        LoadRule("layers/attention/key_DGC", f"{layer}self_attention/key/kernel", "D (G C)"),
        LoadRule("layers/attention/value_DGC", f"{layer}self_attention/value/kernel", "D (G C)"),
        LoadRule("layers/attention/out_HCD", f"{layer}self_attention/out/kernel", "(H C) D"),
        LoadRule("layers/mlp_norm/scale_D", f"{layer}pre_mlp_layer_norm/scale", "D"),
        LoadRule("layers/mlp/in_DF", f"{layer}mlp/{'wi_0' if gated else 'wi'}/kernel", "D F"),
        *linear,
        LoadRule("layers/mlp/out_FD", f"{layer}mlp/wo/kernel", "F D"),
        LoadRule("final_norm/scale_D", "decoder/decoder_norm/scale", "D"),
        *head,
    )


# Stored tensors that are no parameters.


def _not_causal(name: str, value: np.ndarray) -> str | None:
    square = value.shape[-1]
    plain = value.shape == (1, 1, square, square) and np.array_equal(value[0, 0] != 0, np.tri(square, dtype=bool))
    return None if plain else "should be a causal mask"


def _not_masking(name: str, value: np.ndarray) -> str | None:
    return None if value.size == 1 and float(value.reshape(())) <= -1e4 else "should be a large negative number"


_GPT2_BUFFERS = (
    Extra(r"(transformer\.)?h\.\d+\.attn\.bias", _not_causal),
    Extra(r"(transformer\.)?h\.\d+\.attn\.masked_bias", _not_masking),
)


def _rotary_buffer(config: GptConfig) -> Extra:
    """Old Llama folders store RoPE's frequencies."""
    frequencies = config.recipe.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)

    def check(name: str, value: np.ndarray) -> str | None:
        # Half precision keeps eight bits; another base is off by far more.
        same = value.shape == frequencies.shape and np.allclose(value.astype(np.float64), frequencies, rtol=2**-7)
        return None if same else f"should be RoPE's frequencies for rope_theta={config.recipe.rope_theta:g}"

    return Extra(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", check)


# config.json.


def read_config(values: Mapping[str, Any], where: str, *, tied: bool) -> tuple[GptConfig, list[str]]:
    """The config that a config.json of `model_type` gpt2 or llama describes, and remarks for the user.

    `tied`: whether the file's head is its token table. Raises UserError naming a field that is missing or unsupported.
    """
    settings = Settings(values, where)
    model_type = settings.only("model_type", HUGGING_FACE, None)
    return (_read_gpt2 if model_type == "gpt2" else _read_llama)(settings, tied)


def wants_tied(values: Mapping[str, Any], where: str) -> bool:
    """Whether config.json says that the head is the token table; each model type has its own default."""
    return Settings(values, where).flag("tie_word_embeddings", values.get("model_type") == "gpt2")


def _read_gpt2(settings: Settings, tied: bool) -> tuple[GptConfig, list[str]]:
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
    differing = len(set(rates.values())) > 1
    remark = f"one dropout rate serves training: resid_pdrop's {rates['resid_pdrop']:g} of {rates}"
    return config, [remark] if differing else []


def _read_llama(settings: Settings, tied: bool) -> tuple[GptConfig, list[str]]:
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


def write_config(config: GptConfig, *, positions: int | None = None) -> dict[str, Any]:
    """A config.json from which Hugging Face Transformers builds the same network.

    `positions`: the length of the texts it was trained on, if it has no table of positions; None: not known.

    Raises:
        UserError: naming a field that no such network has.
    """
    return _write_gpt2(config) if config.recipe.positions == "learned" else _write_llama(config, positions)


def _write_gpt2(config: GptConfig) -> dict[str, Any]:
    recipe = config.recipe
    _require(config, like=GPT2, name="GPT-2", free=("mlp", "tied_embeddings", "scale_attention"))
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


def _write_llama(config: GptConfig, positions: int | None) -> dict[str, Any]:
    recipe = config.recipe
    _require(config, like=LLAMA, name="Llama", free=("tied_embeddings",))
    if config.d_model % config.num_heads:
        raise UserError(f"model.num_heads is {config.num_heads}: Llama's divides d_model ({config.d_model})")
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
        "max_position_embeddings": positions or LLAMA_POSITIONS,
        "rms_norm_eps": recipe.norm_epsilon,
        # Under both names, for readers of either generation.
        "rope_theta": recipe.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": recipe.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": recipe.tied_embeddings,
    }


_WITHOUT_KEYS = ("init", "dropout", "z_loss", "norm_epsilon", "rope_theta", "relative_buckets", "relative_max_distance")
"""Recipe fields that say how to train, or that are numbers a config.json takes."""


def _require(config: GptConfig, *, like: Recipe, name: str, free: tuple[str, ...]) -> None:
    if config.input_attention != "causal":
        raise UserError(f"model.input_attention is {config.input_attention!r}: {name} has 'causal'")
    for field in dataclasses.fields(Recipe):
        value, theirs = getattr(config.recipe, field.name), getattr(like, field.name)
        irrelevant = field.name == "relative_sides"  # read by T5's biases only, which neither has
        if field.name not in (*_WITHOUT_KEYS, *free) and not irrelevant and value != theirs:
            raise UserError(f"model.recipe.{field.name} is {value!r}: {name} has {theirs!r}")


# T5X.


def read_t5x(tensors: Mapping[str, TensorInfo], where: str) -> tuple[GptConfig, list[str]]:
    """The config that the shapes of a decoder_only checkpoint tell, and what had to be assumed."""

    shape = functools.partial(matrix_shape, tensors, where)
    vocab_size, d_model = shape("decoder/token_embedder/embedding")
    num_heads, buckets = shape("decoder/relpos_bias/rel_embedding")
    gated = "decoder/layers_0/mlp/wi_0/kernel" in tensors
    tied = "decoder/logits_dense/kernel" not in tensors
    recipe = dataclasses.replace(
        T5_V1_1,
        mlp="geglu" if gated else "relu",
        tied_embeddings=tied,
        scale_logits=tied,
        relative_buckets=buckets,
        relative_sides="one",
    )
    config = GptConfig(
        vocab_size=vocab_size,
        num_layers=count_layers(tensors, "decoder", where),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=shape("decoder/layers_0/self_attention/query/kernel")[-1] // num_heads,
        d_ff=shape("decoder/layers_0/mlp/wo/kernel")[0],
        recipe=recipe,
    )
    return config, [f"assumed, since shapes do not tell: {recipe.mlp}, distances up to {recipe.relative_max_distance}"]
