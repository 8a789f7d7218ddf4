"""Sizes of the decoder-only family, with exact parameter and FLOP counts."""

import dataclasses
from typing import Literal

from common.compute.ledger import ForwardFlops, attention_parameters, mlp_parameters
from common.compute.moments import Moments
from common.nn.recipe import LLAMA, Recipe, check_widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptConfig:
    """A decoder of `num_layers` layers; the default recipe is Llama-like (RMSNorm, RoPE, SwiGLU, no biases)."""

    kind: Literal["gpt"] = "gpt"
    vocab_size: int
    """Rows of the token table, padding included."""
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    input_attention: Literal["causal", "bidirectional"] = "causal"
    """Bidirectional inputs make it a prefix LM."""
    recipe: Recipe = LLAMA

    def __post_init__(self) -> None:
        sizes = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type in (int, "int")
        }
        check_widths(sizes, self.recipe)

    def param_count(self) -> int:
        vocab = self.vocab_size * self.d_model * (1 if self.recipe.tied_embeddings else 2)
        bias = self.num_heads * self.recipe.relative_buckets if self.recipe.positions == "t5_bias" else 0
        norms = (2 * self.num_layers + 1) * self.d_model
        return vocab + bias + norms + self.num_layers * self._layer_matrices()

    def flops(self, text: Moments) -> ForwardFlops:
        """A forward pass over `text`: every layer on every token, the head on target tokens only."""
        dense = (
            2 * text.tokens * self.num_layers * self._layer_matrices()
            + 2 * text.targets * self.d_model * self.vocab_size
        )
        pair = 4 * self.num_layers * self.num_heads * self.head_dim
        pairs = text.inputs_squared + 2 * text.inputs_times_targets + text.targets_squared
        # Causal: a triangle over inputs and targets. A bidirectional prefix keeps its whole square.
        half = pairs / 2 if self.input_attention == "causal" else pairs / 2 + text.inputs_squared / 2
        return ForwardFlops(dense=dense, attention_full=pair * pairs, attention_causal_half=round(pair * half))

    def _layer_matrices(self) -> int:
        attention = attention_parameters(self.d_model, self.num_heads, self.num_kv_heads, self.head_dim)
        return sum(attention) + mlp_parameters(self.d_model, self.d_ff, self.recipe.gated_mlp)
