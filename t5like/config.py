"""Sizes of the encoder-decoder family, with exact parameter and FLOP counts."""

import dataclasses
from typing import Literal

from common.compute.ledger import ForwardFlops, attention_parameters, mlp_parameters
from common.compute.moments import Moments
from common.nn.recipe import T5_V1_1, Recipe, check_widths


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5LikeConfig:
    """An encoder and a decoder with cross-attention; the default recipe is T5 v1.1 (arXiv 1910.10683, T5X)."""

    kind: Literal["t5like"] = "t5like"
    vocab_size: int
    """Rows of the token table, padding included; one table serves encoder and decoder."""
    encoder_layers: int
    decoder_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    recipe: Recipe = T5_V1_1

    def __post_init__(self) -> None:
        sizes = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.type in (int, "int")
        }
        check_widths(sizes, self.recipe)

    def param_count(self) -> int:
        vocab = self.vocab_size * self.d_model * (1 if self.recipe.tied_embeddings else 2)
        bias = 2 * self.num_heads * self.recipe.relative_buckets if self.recipe.positions == "t5_bias" else 0
        norms = (2 * self.encoder_layers + 1 + 3 * self.decoder_layers + 1) * self.d_model
        query_out, key_value, mlp = self._matrices()
        encoder = self.encoder_layers * (query_out + key_value + mlp)
        decoder = self.decoder_layers * (2 * (query_out + key_value) + mlp)
        return vocab + bias + norms + encoder + decoder

    def flops(self, text: Moments) -> ForwardFlops:
        """A forward pass over `text`: encoder and cross-attention's keys and values on inputs, the rest on targets."""
        query_out, key_value, mlp = self._matrices()
        per_input = self.encoder_layers * (query_out + key_value + mlp) + self.decoder_layers * key_value
        per_target = self.decoder_layers * (2 * query_out + key_value + mlp) + self.d_model * self.vocab_size
        pair = 4 * self.num_heads * self.head_dim
        encoder = pair * self.encoder_layers * text.inputs_squared
        decoder = pair * self.decoder_layers * text.targets_squared
        cross = pair * self.decoder_layers * text.inputs_times_targets
        return ForwardFlops(
            dense=2 * (text.inputs * per_input + text.targets * per_target),
            attention_full=encoder + decoder + cross,
            attention_causal_half=encoder + round(decoder / 2) + cross,
        )

    def _matrices(self) -> tuple[int, int, int]:
        """(query and output, key and value, MLP) parameters of one layer."""
        attention = attention_parameters(self.d_model, self.num_heads, self.num_kv_heads, self.head_dim)
        return *attention, mlp_parameters(self.d_model, self.d_ff, self.recipe.gated_mlp)


def _v1_1(layers: int, d_model: int, num_heads: int, d_ff: int) -> T5LikeConfig:
    return T5LikeConfig(
        vocab_size=32128,
        encoder_layers=layers,
        decoder_layers=layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=64,
        d_ff=d_ff,
    )


SIZES = {
    # T5X's t5_1_1 gin files.
    "t5-v1.1-small": _v1_1(layers=8, d_model=512, num_heads=6, d_ff=1024),
    "t5-v1.1-base": _v1_1(layers=12, d_model=768, num_heads=12, d_ff=2048),
}
