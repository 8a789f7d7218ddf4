"""CompleteP's factors against the paper's table: initial values, updates, multipliers; at the base sizes, no change."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest

from common.errors import UserError
from common.model import skeleton
from common.nn.parametrization import Scaling, update_scales
from common.recipe import GPT2, T5_V1_0, CompleteP, Recipe, Standard
from common.train.config import Adafactor, AdamW, check_optimizer
from common.train.programs import lower_step, make_programs
from common.trees import flatten
from common.weights.formats import require_recipe
from experiments.families import GPT, T5LIKE, builder
from t5like.config import RUNGS
from tests.helpers import F32, close, fresh, gpt, random_params, random_rows, t5like
from tests.tiny import setup, train_config

WIDTH, LAYERS, HEAD_DIM = 32, 2, 8
BASE = CompleteP(base_width=WIDTH, base_layers=LAYERS, base_head_dim=HEAD_DIM)
UNTIED = Recipe(biases=True, qk_norm=True)
GELU_UNTIED = Recipe(biases=True, mlp="gelu")
LAYERWISE = {"encoder_layers": 3, "decoder_layers": 3}
TIED = dataclasses.replace(GPT2, scale_logits=True, scale_embeddings=True)


def model(family: Any, recipe: Recipe, width: int, layers: int, head_dim: int = HEAD_DIM, **switches: str) -> Any:
    positions = 16 if recipe.positions == "learned" else None
    sizes: dict[str, Any] = {"width": width, "layers": layers, "head_dim": head_dim, "vocab_size": 128}
    return family.sized(**sizes, max_positions=positions, recipe=recipe, **switches)


def transferred(recipe: Recipe, base: CompleteP = BASE) -> Recipe:
    return dataclasses.replace(recipe, parametrization=base)


MODELS = {
    "gpt-untied": (GPT, UNTIED, {}),
    "gpt-tied": (GPT, TIED, {}),
    "t5like-untied": (T5LIKE, UNTIED, {}),
    "t5like-tied": (T5LIKE, T5_V1_0, {}),
    "t5like-relaxed": (T5LIKE, UNTIED, RUNGS[4]),
}
models = pytest.mark.parametrize(("family", "recipe", "switches"), MODELS.values(), ids=MODELS.keys())


@models
def test_at_the_base_sizes_nothing_changes(family: Any, recipe: Recipe, switches: Any) -> None:
    """Initialisation and training step are the same programs, letter for letter."""

    def programs(recipe: Recipe) -> tuple[str, str]:
        made = setup(model(family, recipe, WIDTH, LAYERS, **switches), train_config())
        programs = make_programs(made)
        return programs.init.lower(np.uint32(0)).as_text(), lower_step(made, programs).as_text()

    assert programs(transferred(recipe)) == programs(recipe)


def hidden_matrix(name: str) -> bool:
    """By name, for a check of what the code finds by logical axes."""
    return any(
        part in name for part in ("query_DHC", "key_DGC", "value_DGC", "out_HCD", "in_DF", "linear_DF", "out_FD")
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gpt-untied" else pytest.mark.slow) for name in MODELS]
)
def test_initial_values(name: str) -> None:
    """Twice the depth, four times the width: the variance of a layer's matrices falls by 4, all else stays."""
    family, recipe, switches = MODELS[name]
    base = flatten(fresh(model(family, recipe, WIDTH, LAYERS, **switches))[1])
    wide = flatten(fresh(model(family, transferred(recipe), 4 * WIDTH, 2 * LAYERS, **switches))[1])
    assert base.keys() == wide.keys()
    for leaf, values in wide.items():
        if np.std(base[leaf]) == 0:
            np.testing.assert_array_equal(np.unique(values), np.unique(base[leaf]))
            continue
        noise = math.sqrt(1 / (2 * values.size) + 1 / (2 * base[leaf].size))
        expected = 0.5 if hidden_matrix(leaf) else 1.0
        assert abs(math.log(np.std(values) / np.std(base[leaf]) / expected)) < 5 * noise, leaf


@models
def test_updates(family: Any, recipe: Recipe, switches: Any) -> None:
    """Three times the width and twice the depth, the paper's rates; epsilon follows the size of the gradients."""
    built = skeleton(builder(model(family, transferred(recipe), 3 * WIDTH, 2 * LAYERS, **switches), F32))
    scales = flatten(update_scales(BASE, built.logical_axes, built.shapes))
    assert scales.keys() == flatten(built.shapes).keys()
    for leaf, scale in scales.items():
        in_layer = leaf.startswith(("layers", "encoder.", "decoder."))
        assert scale.rate == pytest.approx(1 / 3 if hidden_matrix(leaf) else 1), leaf
        assert scale.gradient == pytest.approx(6 if in_layer else 3), leaf
    assert sum(hidden_matrix(leaf) for leaf in scales) >= 6


def test_each_stack_has_its_own_depth() -> None:
    config = dataclasses.replace(model(T5LIKE, transferred(UNTIED), WIDTH, 8), decoder_layers=4)
    built = skeleton(builder(config, F32))
    scales = flatten(update_scales(BASE, built.logical_axes, built.shapes))
    found = {leaf.partition(".")[0]: scale.gradient for leaf, scale in scales.items()}
    assert (found["encoder"], found["decoder"], found["embedding"], found["encoder_norm"]) == (4, 2, 1, 1)


@pytest.mark.parametrize(
    "config",
    [
        t5like(GELU_UNTIED, encoder_layers=1, decoder_layers=3),
        pytest.param(gpt(GELU_UNTIED), marks=pytest.mark.slow),
        pytest.param(t5like(GELU_UNTIED, **LAYERWISE, **RUNGS[3]), marks=pytest.mark.slow),
    ],
    ids=["t5like", "gpt", "t5like-layerwise"],
)
def test_multipliers_are_those_of_smaller_weights(config: Any) -> None:
    """The forward pass is that of the standard model whose residual outputs, queries and head are that much smaller."""
    params, batch = random_params(config), random_rows(2)
    transferred_recipe = transferred(config.recipe, CompleteP(base_width=8, base_layers=2, base_head_dim=2))
    m_N, m_C = config.d_model / 8, config.head_dim / 2

    def smaller(path: Any, x: Any) -> Any:
        names = [key.key for key in path]
        depths = {"layers": getattr(config, "num_layers", 0) / 2}
        depths |= {stack: getattr(config, f"{stack}_layers", 0) / 2 for stack in ("encoder", "decoder")}
        if names[-1].startswith("out"):
            return x / np.float32(depths[names[0]])
        if names[-1].startswith("query"):
            return x / np.float32(m_C**0.5)  # beside the division by sqrt(head_dim)
        return x / np.float32(m_N) if names[0] == "output" else x

    def logits(config: Any, params: Any) -> Any:
        built = skeleton(builder(config, F32))
        whole = jax.jit(lambda params: built.merge(params).hidden(batch) @ built.merge(params).head())(params)
        return np.where(batch.weights_BT[..., None] > 0, whole, 0)

    found = logits(dataclasses.replace(config, recipe=transferred_recipe), params)
    close(found, logits(config, jax.tree.map_with_path(smaller, params)), 1e-5)
    assert np.abs(found).max() > 0.1


@pytest.mark.parametrize("heads", [4, 12])
def test_the_relative_bias_is_drawn_as_in_the_base_model(heads: int) -> None:
    config = model(GPT, transferred(T5_V1_0), heads * HEAD_DIM, LAYERS)
    assert Scaling.of(config, LAYERS).base_heads(heads) == pytest.approx(WIDTH / HEAD_DIM)


def test_other_optimizers_are_refused() -> None:
    check_optimizer(Adafactor(), Recipe())
    check_optimizer(AdamW(), transferred(Recipe()))
    with pytest.raises(UserError, match="'adafactor'.*'completep' has rules for 'adamw' only.*nearest"):
        check_optimizer(Adafactor(), transferred(Recipe()))
    with pytest.raises(UserError, match="adamw"):
        make_programs(setup(model(GPT, transferred(Recipe()), WIDTH, 1), train_config(optimizer=Adafactor())))


def test_foreign_formats_refuse_it() -> None:
    """They have no residual multiplier."""
    with pytest.raises(UserError, match="model.recipe.parametrization is 'completep': GPT-2 has 'standard'"):
        require_recipe(transferred(GPT2), GPT2, "GPT-2", ())
    assert GPT2.parametrization == Standard()
