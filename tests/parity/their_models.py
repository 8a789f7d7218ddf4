"""Small models of Hugging Face Transformers with random parameters."""

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCAB = 61

# Large epsilons and few buckets, so that ignoring config.json gives other results.
T5 = {
    "vocab_size": VOCAB,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "layer_norm_epsilon": 1e-3,
    "dropout_rate": 0.0,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 24,
    "n_embd": 24,
    "n_layer": 3,
    "n_head": 4,
    "layer_norm_epsilon": 1e-3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5-v1.0": ("T5ForConditionalGeneration", "T5Config", T5 | {"feed_forward_proj": "relu"}),
    "t5-v1.1": ("T5ForConditionalGeneration", "T5Config", T5 | GATED),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5 | GATED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
}
ENCODER_DECODERS = ("t5-v1.0", "t5-v1.1", "mt5")


def random_model(name: str) -> Any:
    """A model whose parameters, norms' scales and biases included, all differ from their initial values."""
    model_class, config_class, sizes = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, config_class)(**sizes, attn_implementation="eager")
    model = getattr(transformers, model_class)(config).float()
    if name in ("t5-v1.1", "mt5"):
        assert model.lm_head.weight is model.shared.weight, "it is tied whatever its config says"
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, T5["d_model"]) * 0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model
