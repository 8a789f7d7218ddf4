"""The same decoder and training step in PyTorch, from the same weights.

Run as a worker process: `python -m benchmarks.torch_peer WEIGHTS.npz {eager,compiled}`.

Legend: B rows, L length, D model, H heads, C head dim, N layers, V vocab.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import decoder
from common.allocator import keep_freed_memory
from common.train.config import AdamW
from gpt.config import GptConfig


class Layer(nn.Module):
    """Pre-norm residual layer: causal self-attention, then SwiGLU."""

    def __init__(self, config: GptConfig):
        super().__init__()
        D, self.head_dim, self.epsilon = config.d_model, config.head_dim, config.recipe.norm_epsilon
        width = config.num_heads * config.head_dim
        self.attention_norm = nn.Parameter(torch.ones(D))
        self.query_key_value = nn.Linear(D, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, D, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(D))
        self.gate = nn.Linear(D, config.d_ff, bias=False)
        self.up = nn.Linear(D, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, D, bias=False)

    def forward(self, x_BLD: Tensor, cos_LC: Tensor, sin_LC: Tensor) -> Tensor:
        h_BLD = F.rms_norm(x_BLD, x_BLD.shape[-1:], self.attention_norm, self.epsilon)
        q_BHLC, k_BHLC, v_BHLC = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self.query_key_value(h_BLD).chunk(3, dim=-1)
        )
        q_BHLC, k_BHLC = rotate(q_BHLC, cos_LC, sin_LC), rotate(k_BHLC, cos_LC, sin_LC)
        h_BHLC = F.scaled_dot_product_attention(q_BHLC, k_BHLC, v_BHLC, is_causal=True)
        x_BLD = x_BLD + self.attention_out(h_BHLC.transpose(1, 2).flatten(-2))
        h_BLD = F.rms_norm(x_BLD, x_BLD.shape[-1:], self.mlp_norm, self.epsilon)
        return x_BLD + self.down(F.silu(self.gate(h_BLD)) * self.up(h_BLD))


class Decoder(nn.Module):
    """RMSNorm before each branch, RoPE, SwiGLU, no biases, untied head."""

    cos_LC: Tensor
    sin_LC: Tensor

    def __init__(self, config: GptConfig, length: int):
        super().__init__()
        recipe = config.recipe
        assert (recipe.positions, recipe.mlp, recipe.tied_embeddings) == ("rope", "swiglu", False)
        assert recipe.scale_attention and config.num_kv_heads == config.num_heads
        self.epsilon = recipe.norm_epsilon
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.Parameter(torch.ones(config.d_model))
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        half = config.head_dim // 2
        angle_LC = torch.outer(torch.arange(length), recipe.rope_theta ** (-torch.arange(half) / half))
        self.register_buffer("cos_LC", angle_LC.cos(), persistent=False)
        self.register_buffer("sin_LC", angle_LC.sin(), persistent=False)

    def forward(self, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Mean cross-entropy, in nats."""
        x_BLD = self.embedding(tokens_BL)
        for layer in self.layers:
            x_BLD = layer(x_BLD, self.cos_LC, self.sin_LC)
        logits_BLV = self.head(F.rms_norm(x_BLD, x_BLD.shape[-1:], self.final_norm, self.epsilon))
        return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())


def rotate(x_BHLC: Tensor, cos_LC: Tensor, sin_LC: Tensor) -> Tensor:
    """RoPE on pairs (c, c + C/2)."""
    first, second = x_BHLC.chunk(2, dim=-1)
    return torch.cat((first * cos_LC - second * sin_LC, second * cos_LC + first * sin_LC), dim=-1)


@torch.no_grad()
def load(model: Decoder, weights: Mapping[str, np.ndarray]) -> None:
    """Copies `gpt`'s parameters, given by dotted name with layers stacked on the first axis."""

    def matrix(linear: nn.Linear, *arrays: np.ndarray) -> None:
        parts = [torch.tensor(array).reshape(linear.in_features, -1).T for array in arrays]
        linear.weight.copy_(torch.cat(parts))

    model.embedding.weight.copy_(torch.tensor(weights["embedding.table_VD"]))
    model.final_norm.copy_(torch.tensor(weights["final_norm.scale_D"]))
    matrix(model.head, weights["output.weight_DV"])
    for n, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        own = {name.removeprefix("layers."): array[n] for name, array in weights.items() if name.startswith("layers.")}
        layer.attention_norm.copy_(torch.tensor(own["attention_norm.scale_D"]))
        matrix(layer.query_key_value, *(own[f"attention.{name}"] for name in ("query_DHC", "key_DGC", "value_DGC")))
        matrix(layer.attention_out, own["attention.out_HCD"])
        layer.mlp_norm.copy_(torch.tensor(own["mlp_norm.scale_D"]))
        matrix(layer.gate, own["mlp.in_DF"])
        matrix(layer.up, own["mlp.linear_DF"])
        matrix(layer.down, own["mlp.out_FD"])


class Trainer:
    """AdamW with decay on matrices, and clipping by global norm."""

    def __init__(self, model: Decoder, config: AdamW, learning_rate: float):
        self.model, self.clip_norm = model, config.clip_norm
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=learning_rate,
            betas=(config.b1, config.b2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, tokens_BL: Tensor, targets_BL: Tensor) -> float:
        """Trains one step; returns the loss before the update."""
        self.optimizer.zero_grad()
        loss = self.model(tokens_BL, targets_BL)
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item()


def main(path: str, mode: str) -> None:
    keep_freed_memory()
    torch.set_num_threads(decoder.cores())
    with np.load(path, allow_pickle=False) as file:
        weights = dict(file)
    tokens_BL, targets_BL = (torch.tensor(weights.pop(name)).long() for name in ("tokens_BL", "targets_BL"))
    model = Decoder(decoder.DECODER, decoder.LENGTH)
    load(model, weights)
    if mode == "compiled":
        model.compile()
    trainer = Trainer(model, decoder.OPTIMIZER, decoder.LEARNING_RATE)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.step(tokens_BL, targets_BL)

    losses = [trainer.step(tokens_BL, targets_BL) for _ in range(2)]
    decoder.serve(run, {"losses": losses, "version": torch.__version__})


if __name__ == "__main__":
    main(*sys.argv[1:])
