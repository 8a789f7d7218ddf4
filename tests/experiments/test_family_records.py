"""The families' records, and the sizes of the studies' models that they complete."""

import dataclasses
import typing
from typing import Any

import pytest

from common.errors import UserError
from common.recipe import LLAMA, Recipe
from experiments import find
from experiments.families import FAMILIES, GPT, T5LIKE, Family, ModelConfig, family_of
from gpt.config import GptConfig
from t5like.config import T5LikeConfig

of_each_family = pytest.mark.parametrize("family", FAMILIES, ids=[family.kind for family in FAMILIES])


def test_every_family_is_in_the_list() -> None:
    assert {family.config for family in FAMILIES} == set(typing.get_args(ModelConfig))
    assert len({family.kind for family in FAMILIES}) == len(FAMILIES)


@of_each_family
def test_a_family_is_found_by_its_configs(family: Family[Any]) -> None:
    for config in (*family.sizes.values(), family.sized(width=64, layers=2, vocab_size=128, recipe=LLAMA)):
        assert family_of(config) is family and config.kind == family.kind


@of_each_family
def test_a_family_becomes_only_other_families(family: Family[Any]) -> None:
    assert set(family.changes) <= {other.kind for other in FAMILIES} - {family.kind}


@of_each_family
def test_model_types_belong_to_one_family(family: Family[Any]) -> None:
    own = {format.model_type for format in family.load_formats().hugging_face}
    others = [format for other in FAMILIES if other is not family for format in other.load_formats().hugging_face]
    assert own and own.isdisjoint(format.model_type for format in others)


def test_stacks_count_layers_and_slots() -> None:
    t5like = dataclasses.replace(T5LIKE.sizes["t5-v1.1-small"], encoder_layers=3)
    stacks = T5LIKE.stacks(t5like, 100, 10)
    assert [(stack.layers, stack.slots) for stack in stacks] == [(3, 100), (8, 10)]
    (stack,) = GPT.stacks(GPT.sizes["gpt2-small"], 100, 10)
    assert (stack.layers, stack.slots) == (12, 110)


def test_sized_completes_a_config() -> None:
    recipe = Recipe(dropout=0.1)
    assert GPT.sized(width=128, layers=4, vocab_size=512, recipe=recipe) == GptConfig(
        vocab_size=512,
        num_layers=4,
        d_model=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=512,
        recipe=recipe,
    )
    widths = {"heads": 16, "kv_heads": 4, "head_dim": 128, "d_ff": 3000}
    assert T5LIKE.sized(width=1024, layers=6, vocab_size=512, memory="layerwise", **widths) == T5LikeConfig(
        vocab_size=512,
        encoder_layers=6,
        decoder_layers=6,
        d_model=1024,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        d_ff=3000,
        memory="layerwise",
    )


@of_each_family
def test_heads_that_do_not_fill_the_width_are_refused(family: Family[Any]) -> None:
    with pytest.raises(UserError, match="width is 100, which heads of 32 do not fill"):
        family.sized(width=100, layers=2, vocab_size=128)


ARMS = {
    "first_light": {"t5like": (1024, 4, 4, 192, 6, 32, 408), "gpt": (1024, 4, 192, 6, 32, 512)},
    "ladder": {
        "0-enc-dec": (1024, 4, 4, 192, 6, 32, 408),
        "1-merged": (1024, 4, 4, 192, 6, 32, 472),
        "2-shared": (1024, 4, 4, 192, 6, 32, 472),
        "3-layerwise": (1024, 4, 4, 192, 6, 32, 632),
        "4-causal": (1024, 4, 4, 192, 6, 32, 632),
    },
    "multi30k": {"t5like": (4096, 4, 4, 128, 4, 32, 472), "gpt": (4096, 4, 128, 4, 32, 512)},
    "multi30k_accelerator": {"t5like": (4096, 6, 6, 256, 8, 32, 896), "gpt": (4096, 6, 256, 8, 32, 1024)},
    "pydocs": {"t5like": (4096, 4, 4, 128, 4, 32, 456), "gpt": (4096, 4, 128, 4, 32, 512)},
    "xl": {"t5like": (32128, 24, 24, 2048, 32, 64, 5120), "gpt": (32128, 24, 2048, 32, 64, 6400)},
}
"""Vocabulary, layers of each stack, d_model, heads, head_dim, d_ff: finished runs have these."""


@pytest.mark.parametrize("name", ARMS)
def test_the_studies_models_keep_their_sizes(name: str) -> None:
    found = {}
    for arm, side in find.load(name).arms.items():
        model = side.model
        layers = [stack.layers for stack in family_of(model).stacks(model, 1, 1)]
        assert model.num_kv_heads == model.num_heads and model.max_positions is None
        found[arm] = (model.vocab_size, *layers, model.d_model, model.num_heads, model.head_dim, model.d_ff)
    assert found == ARMS[name]
