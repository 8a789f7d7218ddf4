"""Hugging Face's side: `python -m benchmarks.transformers_peer NAME` decodes with `generate` on request."""

import sys
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig

from benchmarks import decoder
from benchmarks.generation import EOS, MODELS, NEW, PROMPT, ROWS
from common.allocator import keep_freed_memory
from experiments.families import ModelConfig, family_of


def make_model(config: ModelConfig) -> Any:
    """The same network in Transformers, with its own random weights."""
    values = family_of(config).load_formats().write_config(config, None)
    network = getattr(transformers, values["architectures"][0])
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": EOS, "decoder_start_token_id": 0}
    model = network(AutoConfig.for_model(**values, **ids))
    head = model.get_output_embeddings()
    if not config.recipe.tied_embeddings:
        # Recent versions tie T5's head whatever the config says, unless a file has other values for it.
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    return model.eval()


def main(name: str) -> None:
    keep_freed_memory()
    torch.set_num_threads(decoder.cores())
    config = MODELS[name]
    model = make_model(config)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(2, config.vocab_size, (ROWS, PROMPT)))
    before = 1 if family_of(config).encodes_inputs else PROMPT  # a start token, or the prompt

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
            assert made.shape == (ROWS, before + NEW), made.shape

    with torch.inference_mode():
        run(1)
        size = sum(p.numel() for p in model.parameters())
        version = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
        decoder.serve(run, {"version": version, "parameters": size})


if __name__ == "__main__":
    main(sys.argv[1])
