"""Between the families: a decoder-only model's weights as an encoder-decoder's, and back.

With all four switches of the ladder removed the two are one model under two sets of names, so the map is exact. Above
that the encoder starts as a copy of the decoder, and cross-attention as one of self-attention: adaptation as in
T5Gemma (Zhang et al. 2025, "Encoder-Decoder Gemma", https://arxiv.org/abs/2504.06225, section 3).
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from common.errors import UserError
from common.trees import flatten, nest
from gpt.config import GptConfig
from t5like.config import RUNGS, T5LikeConfig

RELAXED = {
    "embedding": "embedding",
    "positions": "positions",
    "decoder_bias": "relative_bias",
    "decoder": "layers",
    "decoder_norm": "final_norm",
    "output": "output",
}
"""t5like's names and gpt's, where t5like's parameters are shared and its attention merged."""
ENCODER = {"encoder_bias": "relative_bias", "encoder": "layers"}
"""What it has besides where parameters are separate ..."""
ENCODER_NORM = {"encoder_norm": "final_norm"}
"""... and memory is the encoder's output."""
CROSS = {"decoder/cross_norm": "layers/attention_norm", "decoder/cross_attention": "layers/attention"}
"""Where cross-attention is separate."""

Tree = Mapping[str, Any]


def relaxed_from_gpt(tree: Tree) -> dict[str, Any]:
    """The parameters of a fully relaxed t5like (or of a three-switch one, for a prefix LM) from gpt's; same arrays."""
    return _renamed(tree, {theirs: ours for ours, theirs in RELAXED.items()})


def gpt_from_relaxed(tree: Tree) -> dict[str, Any]:
    """The inverse of `relaxed_from_gpt`."""
    return _renamed(tree, RELAXED)


def _renamed(tree: Tree, names: Mapping[str, str]) -> dict[str, Any]:
    for name in tree:
        assert name in names, f"{name} has no counterpart among {sorted(names)}"
    return {names[name]: value for name, value in tree.items()}


def t5like_from_gpt(tree: Tree, config: T5LikeConfig) -> dict[str, Any]:
    """Parameters for `config`, one of the ladder's rungs, from gpt's; copies are the same arrays."""
    leaves = flatten(tree, "/")
    return nest({ours: leaves[theirs] for ours, theirs in t5like_leaves(leaves, config).items()}, "/")


def t5like_leaves(gpt_leaves: Iterable[str], config: T5LikeConfig) -> dict[str, str]:
    """Which of gpt's leaves each of t5like's is copied from.

    >>> from t5like.config import SIZES
    >>> list(t5like_leaves(["final_norm/scale_D"], SIZES["t5-v1.1-small"]))
    ['decoder_norm/scale_D', 'encoder_norm/scale_D']
    """
    names = dict(RELAXED)
    if config.parameters == "separate":
        names |= ENCODER
        names |= ENCODER_NORM if config.memory == "final" else {}
    if config.cross_attention == "separate":
        names |= CROSS
    return {
        ours + leaf.removeprefix(theirs): leaf
        for ours, theirs in names.items()
        for leaf in gpt_leaves
        if leaf.startswith(f"{theirs}/")
    }


def t5like_config(config: GptConfig, rung: int) -> T5LikeConfig:
    """The ladder's rung (0: an encoder-decoder, 4: the same model) at gpt's sizes.

    Raises:
        UserError: for a rung that does not exist, or whose inputs see less than the gpt's do.
    """
    if not 0 <= rung < len(RUNGS):
        raise UserError(f"rung {rung} does not exist; valid: 0 to {len(RUNGS) - 1}")
    switches: dict[str, Any] = RUNGS[rung]
    causal = switches.get("input_attention") == "causal"
    if causal and config.input_attention == "bidirectional":
        raise UserError(f"rung {rung} reads inputs causally, the model reads them both ways; nearest: {rung - 1}")
    recipe = config.recipe
    if not causal and config.input_attention == "causal" and recipe.relative_sides == "as_seen":
        # Buckets learned looking back keep their meaning; keys ahead share the bucket of distance 0.
        recipe = dataclasses.replace(recipe, relative_sides="one")
    return T5LikeConfig(
        vocab_size=config.vocab_size,
        encoder_layers=config.num_layers,
        decoder_layers=config.num_layers,
        d_model=config.d_model,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        d_ff=config.d_ff,
        max_positions=config.max_positions,
        recipe=recipe,
        **switches,
    )


def gpt_config(config: T5LikeConfig) -> GptConfig:
    """The gpt that a relaxed t5like is.

    Raises:
        UserError: naming a switch that still tells them apart.
    """
    for field, value in RUNGS[3].items():
        if getattr(config, field) != value:
            raise UserError(
                f"model.{field} is {getattr(config, field)!r}: only a t5like with {field}={value} is a gpt "
                f"(all of: {', '.join(f'{name}={needed}' for name, needed in RUNGS[3].items())})"
            )
    return GptConfig(
        vocab_size=config.vocab_size,
        num_layers=config.decoder_layers,
        d_model=config.d_model,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        d_ff=config.d_ff,
        max_positions=config.max_positions,
        input_attention=config.input_attention,
        recipe=config.recipe,
    )
