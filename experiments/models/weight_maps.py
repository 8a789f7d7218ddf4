"""Changes between the families: a decoder-only model's weights as an encoder-decoder's, and back.

With all four switches of the ladder removed the two families are the same model under two sets of names, so the map is
exact. On the other rungs the encoder starts as a copy of the decoder, and cross-attention as a copy of self-attention:
adaptation as in T5Gemma (Zhang et al. 2025, "Encoder-Decoder Gemma", https://arxiv.org/abs/2504.06225, section 3).

"Leaf" is a parameter, named by its path with slashes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from common.errors import UserError
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
"""t5like's names and gpt's, if t5like's parameters are shared and its attention merged."""
ENCODER = {"encoder_bias": "relative_bias", "encoder": "layers"}
"""Further names with separate parameters ..."""
ENCODER_NORM = {"encoder_norm": "final_norm"}
"""... and with memory that is the encoder's output."""
CROSS = {"decoder/cross_norm": "layers/attention_norm", "decoder/cross_attention": "layers/attention"}
"""Further names with separate cross-attention."""

Tree = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyChange:
    """How a model of one family becomes a model of another."""

    config: Callable[[Any, int], Any]
    """(config, rung of the ladder) -> config in the other family; UserError if there is none."""
    origins: Callable[[Iterable[str], Any], dict[str, str]]
    """(this family's leaves, the other family's config) -> the leaf that each of the other's leaves is copied from."""


def relaxed_from_gpt(tree: Tree) -> dict[str, Any]:
    """gpt's parameters as those of a fully relaxed t5like (or of rung 3, for a prefix LM); same arrays."""
    return _renamed(tree, {theirs: ours for ours, theirs in RELAXED.items()})


def gpt_from_relaxed(tree: Tree) -> dict[str, Any]:
    """The inverse of `relaxed_from_gpt`."""
    return _renamed(tree, RELAXED)


def _renamed(tree: Tree, names: Mapping[str, str]) -> dict[str, Any]:
    for name in tree:
        assert name in names, f"{name} has no counterpart among {sorted(names)}"
    return {names[name]: value for name, value in tree.items()}


def t5like_origins(gpt_leaves: Iterable[str], config: T5LikeConfig) -> dict[str, str]:
    """The leaf of gpt that each of t5like's leaves is copied from.

    >>> from t5like.config import SIZES
    >>> t5like_origins(["final_norm/scale_D"], SIZES["t5-v1.1-small"])
    {'decoder_norm/scale_D': 'final_norm/scale_D', 'encoder_norm/scale_D': 'final_norm/scale_D'}
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


def gpt_origins(relaxed_leaves: Iterable[str]) -> dict[str, str]:
    """The leaf of a relaxed t5like that each of gpt's leaves is copied from.

    >>> gpt_origins(["decoder_norm/scale_D"])
    {'final_norm/scale_D': 'decoder_norm/scale_D'}
    """
    origins = {}
    for leaf in relaxed_leaves:
        name, slash, rest = leaf.partition("/")
        origins[RELAXED[name] + slash + rest] = leaf
    return origins


def t5like_config(config: GptConfig, rung: int) -> T5LikeConfig:
    """The t5like at a rung of the ladder (0: an encoder-decoder, 4: the same model) with gpt's sizes.

    Raises:
        UserError: for a rung that does not exist, or whose inputs see less than gpt's do.
    """
    if not 0 <= rung < len(RUNGS):
        raise UserError(f"rung {rung} does not exist; valid: 0 to {len(RUNGS) - 1}")
    switches: dict[str, Any] = RUNGS[rung]
    causal = switches.get("input_attention") == "causal"
    if causal and config.input_attention == "bidirectional":
        raise UserError(f"rung {rung} reads inputs causally, the model reads them both ways; nearest: {rung - 1}")
    recipe = config.recipe
    if not causal and config.input_attention == "causal" and recipe.relative_sides == "as_seen":
        # Buckets trained on keys behind keep their meaning; keys ahead share the bucket of distance 0.
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
    """The gpt that is the same model as a relaxed t5like.

    Raises:
        UserError: naming a switch that is not removed.
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


TO_T5LIKE = FamilyChange(config=t5like_config, origins=t5like_origins)
TO_GPT = FamilyChange(
    config=lambda config, rung: gpt_config(config), origins=lambda leaves, config: gpt_origins(leaves)
)
