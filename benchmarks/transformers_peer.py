"""Hugging Face's side: `python -m benchmarks.transformers_peer NAME` decodes with `generate` when it is told."""

import sys

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from benchmarks import decoder
from benchmarks.generation import EOS, MODELS, NEW, PROMPT, ROWS
from gpt.config import GptConfig
from t5like.config import T5LikeConfig


def t5(c: T5LikeConfig) -> PreTrainedModel:
    assert c.encoder_layers == c.decoder_layers and c.num_heads == c.num_kv_heads and c.recipe.mlp == "geglu"
    config = T5Config(
        vocab_size=c.vocab_size,
        d_model=c.d_model,
        d_kv=c.head_dim,
        d_ff=c.d_ff,
        num_layers=c.encoder_layers,
        num_heads=c.num_heads,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=EOS,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config.decoder_start_token_id = 0
    if not c.recipe.tied_embeddings:  # recent versions tie the two whatever the config says, until a file unties them
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def llama(c: GptConfig) -> PreTrainedModel:
    assert (c.recipe.positions, c.recipe.mlp, c.recipe.norm) == ("rope", "swiglu", "rmsnorm")
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        tie_word_embeddings=c.recipe.tied_embeddings,
        pad_token_id=0,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def main(name: str) -> None:
    torch.set_num_threads(decoder.cores())
    c = MODELS[name]
    model = (t5(c) if isinstance(c, T5LikeConfig) else llama(c)).eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2, c.vocab_size, (ROWS, PROMPT)))

    def run(batches: int) -> None:
        for _ in range(batches):
            made = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                use_cache=True,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
            )
            before = 1 if isinstance(c, T5LikeConfig) else PROMPT
            assert made.shape == (ROWS, before + NEW), made.shape

    with torch.inference_mode():
        run(1)
        size = sum(p.numel() for p in model.parameters())
        version = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
        decoder.serve(run, {"version": version, "parameters": size})


if __name__ == "__main__":
    main(sys.argv[1])
