"""The config of the decoder-only family, with exact parameter and FLOP counts, and published sizes."""

import dataclasses
from typing import Literal

from common.compute import ledger
from common.compute.ledger import ForwardFlops
from common.compute.length_sums import LengthSums
from common.ranges import Layers, Tokens, Width
from common.recipe import GPT2, LLAMA, T5_V1_1, Recipe, check_widths
from common.sizes import block_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptConfig:
    """A decoder of `num_layers` layers; the default recipe is Llama-like (RMSNorm, RoPE, SwiGLU, no biases)."""

    kind: Literal["gpt"] = "gpt"
    vocab_size: Width
    """Rows of the token table, padding included."""
    num_layers: Layers
    d_model: Width
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    d_ff: Width
    max_positions: Tokens | None = None
    """Rows of the table of learned positions, if the recipe has one."""
    input_attention: Literal["causal", "bidirectional"] = "causal"
    """Bidirectional inputs make it a prefix LM."""
    recipe: Recipe = LLAMA

    def __post_init__(self) -> None:
        check_widths(self)

    @property
    def reads_incrementally(self) -> bool:
        """Whether a cache stays valid when more text follows: with causal inputs no earlier key or value changes."""
        return self.input_attention == "causal"

    def param_count(self) -> int:
        """Exact number of parameters."""
        layer = ledger.attention_parameters(self) + ledger.mlp_parameters(self)
        tables = ledger.table_parameters(self, self.vocab_size, self.max_positions) + ledger.bias_parameters(self)
        return tables + self.num_layers * layer + ledger.norm_parameters(self)

    def flops(self, text: LengthSums) -> ForwardFlops:
        """Exact FLOPs of a forward pass over `text`: every layer on every token, the head on target tokens only."""
        layer = ledger.query_out_matrices(self) + ledger.key_value_matrices(self) + ledger.mlp_matrices(self)
        head = text.targets * self.d_model * self.vocab_size
        dense = text.tokens * self.num_layers * layer + head
        pair = self.num_layers * ledger.pair_flops(self)
        pairs = text.inputs_squared + 2 * text.inputs_times_targets + text.targets_squared
        # Causal attention is a triangle over inputs and targets; a bidirectional prefix is a full square in it.
        half = pairs / 2 if self.input_attention == "causal" else pairs / 2 + text.inputs_squared / 2
        return ForwardFlops(
            dense=2 * dense,
            head=2 * head,
            mlp=2 * text.tokens * self.num_layers * ledger.mlp_matrices(self),
            mlp_out=2 * text.tokens * self.num_layers * ledger.mlp_out_matrix(self),
            attention_full=pair * pairs,
            attention_causal_half=round(pair * half),
        )


def sized(
    *,
    width: int,
    layers: int,
    vocab_size: int,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    d_ff: int | None = None,
    max_positions: int | None = None,
    input_attention: Literal["causal", "bidirectional"] = "causal",
    recipe: Recipe = LLAMA,
) -> GptConfig:
    """A model of a width and a depth; `common.sizes.block_sizes` completes what is not given."""
    return GptConfig(
        vocab_size=vocab_size,
        num_layers=layers,
        **block_sizes(width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, d_ff=d_ff),
        max_positions=max_positions,
        input_attention=input_attention,
        recipe=recipe,
    )


def _gpt2(layers: int, width: int) -> GptConfig:
    return sized(width=width, layers=layers, vocab_size=50257, head_dim=64, max_positions=1024, recipe=GPT2)


def _llama(
    layers: int, width: int, heads: int, d_ff: int, *, kv_heads: int | None = None, vocab_size: int = 32000
) -> GptConfig:
    recipe = dataclasses.replace(LLAMA, norm_epsilon=1e-5)
    return sized(
        width=width, layers=layers, heads=heads, kv_heads=kv_heads, d_ff=d_ff, vocab_size=vocab_size, recipe=recipe
    )


def _llama3(config: GptConfig) -> GptConfig:
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, rope_theta=500_000.0))


def _t5x(layers: int, width: int, heads: int, d_ff: int) -> GptConfig:
    recipe = dataclasses.replace(T5_V1_1, tied_embeddings=True, scale_logits=True, relative_sides="one")
    return sized(width=width, layers=layers, heads=heads, head_dim=64, d_ff=d_ff, vocab_size=32128, recipe=recipe)


SIZES = {
    # OpenAI's gpt-2 models (Radford et al. 2019).
    "gpt2-small": _gpt2(12, 768),
    "gpt2-medium": _gpt2(24, 1024),
    "gpt2-large": _gpt2(36, 1280),
    "gpt2-xl": _gpt2(48, 1600),
    # arXiv 2401.02385, 2307.09288 and 2407.21783.
    "llama-1.1b": _llama(22, 2048, 32, 5632, kv_heads=4),
    "llama-2-7b": _llama(32, 4096, 32, 11008),
    "llama-2-13b": _llama(40, 5120, 40, 13824),
    "llama-2-70b": _llama(80, 8192, 64, 28672, kv_heads=8),
    "llama-3-8b": _llama3(_llama(32, 4096, 32, 14336, kv_heads=8, vocab_size=128256)),
    # T5X's decoder_only gin files: T5 v1.1's widths in one stack, embeddings tied.
    "t5x-decoder-base": _t5x(12, 768, 12, 2048),
    "t5x-decoder-large": _t5x(24, 1024, 16, 2816),
    "t5x-decoder-xl": _t5x(24, 2048, 32, 5120),
    "t5x-decoder-xxl": _t5x(24, 4096, 64, 10240),
}
"""Published models by name."""
