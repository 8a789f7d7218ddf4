"""The config of the encoder-decoder family: its four switches, exact parameter and FLOP counts, published sizes."""

import dataclasses
from typing import Any, Literal

from common.compute import ledger
from common.compute.ledger import ForwardFlops
from common.compute.length_sums import LengthSums
from common.errors import UserError
from common.ranges import Layers, Tokens, Width
from common.recipe import T5_V1_0, T5_V1_1, Recipe, check_widths
from common.sizes import block_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5LikeConfig:
    """An encoder, and a decoder that reads it; the default recipe is T5 v1.1 (arXiv 1910.10683, T5X).

    Four independent switches (`cross_attention`, `parameters`, `memory`, `input_attention`) each remove one difference
    from a decoder-only model. With all four removed it is one (Hyung Won Chung, Stanford CS25, 2024).
    """

    kind: Literal["t5like"] = "t5like"
    vocab_size: Width
    """Rows of the token table, padding included; one table serves encoder and decoder."""
    encoder_layers: Layers
    decoder_layers: Layers
    d_model: Width
    num_heads: Width
    num_kv_heads: Width
    head_dim: Width
    d_ff: Width
    max_positions: Tokens | None = None
    """Rows of the table of learned positions, if the recipe has one; encoder and decoder share it."""
    cross_attention: Literal["separate", "merged"] = "separate"
    """Merged: self-attention reads [memory ; decoder states] in one softmax."""
    parameters: Literal["separate", "shared"] = "separate"
    """Shared: encoder and decoder use the same layers and final norm."""
    memory: Literal["final", "layerwise"] = "final"
    """What decoder layer l reads: the encoder's final-normed output, or the stream entering encoder layer l."""
    input_attention: Literal["bidirectional", "causal"] = "bidirectional"
    recipe: Recipe = T5_V1_1

    def __post_init__(self) -> None:
        check_widths(self)
        if (self.parameters, self.memory) != ("separate", "final") and self.encoder_layers != self.decoder_layers:
            raise UserError(
                f"encoder_layers is {self.encoder_layers} and decoder_layers {self.decoder_layers}: shared parameters "
                f"and layerwise memory need equally many of both; nearest: {self.decoder_layers}"
            )

    @property
    def reuses_keys_values(self) -> bool:
        """Whether decoder layers read the same keys and values that encoder layers attend to."""
        return (self.cross_attention, self.parameters, self.memory) == ("merged", "shared", "layerwise")

    @property
    def reads_incrementally(self) -> bool:
        """Whether a cache stays valid when more text follows.

        For that a token's keys and values must be the same as an input and as a target, and no input sees a later one.
        """
        return self.reuses_keys_values and self.input_attention == "causal"

    def param_count(self) -> int:
        """Exact number of parameters."""
        attention, mlp, norm = (
            count(self) for count in (ledger.attention_parameters, ledger.mlp_parameters, ledger.norm_parameters)
        )
        tables = ledger.table_parameters(self, self.vocab_size, self.max_positions)
        cross = attention if self.cross_attention == "separate" else 0
        decoder = self.decoder_layers * (attention + cross + mlp) + norm + ledger.bias_parameters(self)
        if self.parameters == "shared":
            return tables + decoder
        encoder = self.encoder_layers * (attention + mlp) + ledger.bias_parameters(self)
        return tables + encoder + decoder + (norm if self.memory == "final" else 0)

    def flops(self, text: LengthSums) -> ForwardFlops:
        """Exact FLOPs of a forward pass over `text`: encoder and memory's keys, values on inputs, the rest on targets.

        With layerwise memory nothing reads the last encoder layer, so it does not run. Without any inputs, separate
        cross-attention does not run.
        """
        query_out, key_value = ledger.query_out_matrices(self), ledger.key_value_matrices(self)
        mlp, pair = ledger.mlp_matrices(self), ledger.pair_flops(self)
        encoder_layers = self.encoder_layers - (self.memory == "layerwise")
        # Reused keys and values come from the encoder; only the last layer's are computed in addition.
        memory_layers = 1 if self.reuses_keys_values else self.decoder_layers
        attentions = 2 if self.cross_attention == "separate" and text.inputs else 1
        per_input = encoder_layers * (query_out + key_value + mlp) + memory_layers * key_value
        per_target = self.decoder_layers * (attentions * query_out + key_value + mlp) + self.d_model * self.vocab_size
        encoder = pair * encoder_layers * text.inputs_squared
        decoder = pair * self.decoder_layers * text.targets_squared
        cross = pair * self.decoder_layers * text.inputs_times_targets
        encoder_half = encoder if self.input_attention == "bidirectional" else round(encoder / 2)
        in_stacks = 2 * (text.inputs * encoder_layers + text.targets * self.decoder_layers)
        return ForwardFlops(
            dense=2 * (text.inputs * per_input + text.targets * per_target),
            head=2 * text.targets * self.d_model * self.vocab_size,
            mlp=in_stacks * mlp,
            mlp_out=in_stacks * ledger.mlp_out_matrix(self),
            attention_full=encoder + decoder + cross,
            attention_causal_half=encoder_half + round(decoder / 2) + cross,
        )


RUNGS: tuple[dict[str, Any], ...] = (
    {},
    {"cross_attention": "merged"},
    {"cross_attention": "merged", "parameters": "shared"},
    {"cross_attention": "merged", "parameters": "shared", "memory": "layerwise"},
    {"cross_attention": "merged", "parameters": "shared", "memory": "layerwise", "input_attention": "causal"},
)
"""The ladder: the talk's path from an encoder-decoder (rung 0) to a decoder-only model (rung 4), as switches."""


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
    cross_attention: Literal["separate", "merged"] = "separate",
    parameters: Literal["separate", "shared"] = "separate",
    memory: Literal["final", "layerwise"] = "final",
    input_attention: Literal["bidirectional", "causal"] = "bidirectional",
    recipe: Recipe = T5_V1_1,
) -> T5LikeConfig:
    """A model of a width and a depth, `layers` a stack; `common.sizes.block_sizes` completes what is not given."""
    return T5LikeConfig(
        vocab_size=vocab_size,
        encoder_layers=layers,
        decoder_layers=layers,
        **block_sizes(width, heads=heads, kv_heads=kv_heads, head_dim=head_dim, d_ff=d_ff),
        max_positions=max_positions,
        cross_attention=cross_attention,
        parameters=parameters,
        memory=memory,
        input_attention=input_attention,
        recipe=recipe,
    )


def _t5(recipe: Recipe, layers: int, width: int, heads: int, d_ff: int, head_dim: int = 64) -> T5LikeConfig:
    return sized(width=width, layers=layers, heads=heads, head_dim=head_dim, d_ff=d_ff, vocab_size=32128, recipe=recipe)


SIZES = {
    # arXiv 1910.10683, section 3.7.
    "t5-v1.0-small": _t5(T5_V1_0, 6, 512, 8, 2048),
    "t5-v1.0-base": _t5(T5_V1_0, 12, 768, 12, 3072),
    "t5-v1.0-large": _t5(T5_V1_0, 24, 1024, 16, 4096),
    "t5-v1.0-3b": _t5(T5_V1_0, 24, 1024, 32, 16384, head_dim=128),
    "t5-v1.0-11b": _t5(T5_V1_0, 24, 1024, 128, 65536, head_dim=128),
    # T5X's t5_1_1 gin files.
    "t5-v1.1-small": _t5(T5_V1_1, 8, 512, 6, 1024),
    "t5-v1.1-base": _t5(T5_V1_1, 12, 768, 12, 2048),
    "t5-v1.1-large": _t5(T5_V1_1, 24, 1024, 16, 2816),
    "t5-v1.1-xl": _t5(T5_V1_1, 24, 2048, 32, 5120),
    "t5-v1.1-xxl": _t5(T5_V1_1, 24, 4096, 64, 10240),
}
"""Published models by name."""
