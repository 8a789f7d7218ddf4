"""What all T5X networks share: names of a layer's parameters, and sizes inferred from shapes.

Kernels are (in, out) with heads merged. Axes: V vocab, D model, H heads, G key-value heads, C head dim, F mlp,
R buckets.
"""

import dataclasses
from collections.abc import Mapping

from common.errors import UserError
from common.recipe import T5_V1_1, Recipe
from common.weights.mapping import LoadRule, TensorInfo

_HEAD = "decoder/logits_dense/kernel"


def attention_rules(leaf: str, key: str) -> tuple[LoadRule, ...]:
    """Returns the rules for an attention's projections: our path begins with `leaf`, T5X's with `key`."""
    return (
        LoadRule(f"{leaf}/query_DHC", f"{key}/query/kernel", "D (H C)"),
        LoadRule(f"{leaf}/key_DGC", f"{key}/key/kernel", "D (G C)"),
        LoadRule(f"{leaf}/value_DGC", f"{key}/value/kernel", "D (G C)"),
        LoadRule(f"{leaf}/out_HCD", f"{key}/out/kernel", "(H C) D"),
    )


def mlp_rules(leaf: str, key: str, recipe: Recipe) -> tuple[LoadRule, ...]:
    """Returns the rules for an MLP's projections: our path begins with `leaf`, T5X's with `key`."""
    linear = (LoadRule(f"{leaf}/linear_DF", f"{key}/wi_1/kernel", "D F"),) if recipe.gated_mlp else ()
    return (
        LoadRule(f"{leaf}/in_DF", f"{key}/{'wi_0' if recipe.gated_mlp else 'wi'}/kernel", "D F"),
        *linear,
        LoadRule(f"{leaf}/out_FD", f"{key}/wo/kernel", "F D"),
    )


def head_rules(recipe: Recipe) -> tuple[LoadRule, ...]:
    """Returns the rule for the output projection; none if the token table serves as it."""
    return () if recipe.tied_embeddings else (LoadRule("output/weight_DV", _HEAD, "D V"),)


def read_recipe(tensors: Mapping[str, TensorInfo], stack: str, buckets: int) -> tuple[Recipe, list[str]]:
    """Returns (recipe, assumptions) of a checkpoint: T5 v1.1's recipe, changed where the parameters show otherwise."""
    gated, tied = f"{stack}/layers_0/mlp/wi_0/kernel" in tensors, _HEAD not in tensors
    recipe = dataclasses.replace(
        T5_V1_1,
        mlp="geglu" if gated else "relu",
        tied_embeddings=tied,
        scale_logits=tied,
        relative_buckets=buckets,
    )
    return recipe, [f"assumed, since shapes do not tell: {recipe.mlp}, distances up to {recipe.relative_max_distance}"]


def matrix_shape(tensors: Mapping[str, TensorInfo], where: str, name: str) -> tuple[int, int]:
    """Returns the shape of a parameter; raises UserError if it is missing or not a matrix."""
    if name not in tensors:
        raise UserError(f"{where}: {name} is missing, and sizes cannot be inferred without it")
    shape = tuple(tensors[name].shape)
    if len(shape) != 2 or not all(shape):
        raise UserError(f"{where}: {name} is {list(shape)}, and should be a matrix")
    return shape


def count_layers(tensors: Mapping[str, TensorInfo], stack: str, where: str) -> int:
    """Returns the number of layers of a stack; raises UserError if there are none."""
    count = sum(name.startswith(f"{stack}/layers_") and name.endswith("/mlp/wo/kernel") for name in tensors)
    if not count:
        raise UserError(f"{where}: {stack}/layers_0/mlp/wo/kernel is missing, and sizes cannot be inferred without it")
    return count
