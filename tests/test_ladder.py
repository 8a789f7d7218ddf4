"""The four switches from an encoder-decoder to a decoder-only model, alone and together."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.compute.hlo import parse_lowered
from common.compute.length_sums import LengthSums
from common.compute.traffic import product_flops
from common.data.batch import Batch, Prompt
from common.errors import UserError
from common.model import skeleton
from common.nn.loss import cross_entropy
from common.recipe import Execution, Recipe
from experiments.families import ModelConfig, builder
from experiments.models.weight_maps import gpt_from_relaxed, relaxed_from_gpt
from t5like.config import RUNGS, T5LikeConfig
from tests.helpers import (
    BIAS,
    COMPLETEP,
    F32,
    GEMMA,
    LEARNED,
    PAIRS,
    ROPE,
    VOCAB,
    close,
    gpt,
    graph,
    random_params,
    random_rows,
    rows_of,
    t5like,
)

SWITCHES = {
    "cross_attention": ("separate", "merged"),
    "parameters": ("separate", "shared"),
    "memory": ("final", "layerwise"),
    "input_attention": ("bidirectional", "causal"),
}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2}
COMBINATIONS = {
    "-".join(values): dict(zip(SWITCHES, values, strict=True)) for values in itertools.product(*SWITCHES.values())
}
QUICK_RUNGS = [{switch: values[0] for switch, values in SWITCHES.items()} | RUNGS[number] for number in (0, 2, 4)]
all_combinations = pytest.mark.parametrize(
    "switches",
    [
        pytest.param(switches, id=name, marks=[] if switches in QUICK_RUNGS else pytest.mark.slow)
        for name, switches in COMBINATIONS.items()
    ],
)
RECIPES = {
    "rope": ROPE,
    "bias": BIAS,
    "bias-two-sided": dataclasses.replace(BIAS, relative_sides="two"),
    "learned": LEARNED,
    "gemma": GEMMA,
    "completep": COMPLETEP,
}
UNPACKED = [[pair] for pair in PAIRS]


def results(config: ModelConfig, params: Any, batch: Batch, execution: Execution = F32) -> tuple[Any, Any, Any]:
    """(logits on target slots that are not padding, loss, gradients), computed in one program."""
    graphdef = graph(config, execution)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        h_BTD, w_DV = model.hidden(batch), model.head()
        total, _ = cross_entropy(h_BTD, w_DV, batch.targets_BT, batch.weights_BT, 1e-4, 64, True)
        return total, jnp.where((batch.target_segments_BT > 0)[..., None], h_BTD @ w_DV, 0)

    (total, logits_BTV), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits_BTV, total, gradients


@pytest.mark.parametrize(
    ("recipe", "input_attention"),
    [
        pytest.param(RECIPES[name], attention, id=f"{name}-{attention}", marks=[] if quick else pytest.mark.slow)
        for name in RECIPES
        for attention in ("causal", "bidirectional")
        for quick in (f"{name}-{attention}" in ("rope-causal", "bias-bidirectional"),)
    ],
)
def test_the_relaxed_encoder_decoder_is_the_decoder_only_model(recipe: Recipe, input_attention: Any) -> None:
    """With all four switches removed it is the causal model, with three the prefix LM.

    Compares logits, loss and every leaf's gradient. The last row packs the examples of the other rows.
    """
    decoder_only = gpt(recipe, input_attention=input_attention)
    relaxed = t5like(recipe, **LAYERS, **{**RUNGS[3], "input_attention": input_attention})
    params, batch = random_params(decoder_only), rows_of([*UNPACKED, PAIRS])
    found = results(relaxed, relaxed_from_gpt(params), batch)
    expected = results(decoder_only, params, batch)
    close(found[:2], expected[:2], 1e-5)
    gradients, expected_gradients = gpt_from_relaxed(found[2]), expected[2]
    for tree in (gradients, expected_gradients):
        attention = tree["layers"]["attention"]
        if recipe.biases:
            # Adding a constant to all of a query's logits leaves softmax unchanged: the gradient is only rounding.
            assert np.abs(attention.pop("key_bias_GC")).max() < 1e-5 * np.abs(attention["query_bias_HC"]).max()
    close(gradients, expected_gradients, 1e-5)


@pytest.mark.slow
def test_relaxed_equality_at_depth() -> None:
    decoder_only = gpt(ROPE, num_layers=8)
    relaxed = t5like(ROPE, encoder_layers=8, decoder_layers=8, **RUNGS[4])
    params, batch = random_params(decoder_only), random_rows(4)
    scanned = dataclasses.replace(F32, scan_layers=True, remat="full")
    found = results(relaxed, relaxed_from_gpt(params), batch, scanned)
    expected = results(decoder_only, params, batch, scanned)
    close((*found[:2], gpt_from_relaxed(found[2])), expected, 1e-5)


@all_combinations
def test_every_combination_trains_and_decodes(switches: dict[str, str]) -> None:
    """Exact parameter count, a gradient for every parameter; packing and caching change no logits."""
    # Merged attention has a relative bias from targets to memory, so it is tested with one.
    config = t5like(BIAS if switches["cross_attention"] == "merged" else ROPE, **LAYERS, **switches)
    params = random_params(config)
    assert sum(x.size for x in jax.tree.leaves(params)) == config.param_count()
    logits_BTV, _, gradients = results(config, params, rows_of([*UNPACKED, PAIRS]))
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        assert np.isfinite(gradient).all(), path
        if "encoder" not in str(path) or config.memory == "final":
            assert np.abs(gradient).max() > 0, path

    alone, packed, start = logits_BTV[:-1], logits_BTV[-1], 0
    for row, (_, targets) in enumerate(PAIRS):
        close(packed[start : start + len(targets)], alone[row, : len(targets)], 1e-5)
        start += len(targets)

    batch, graphdef = rows_of(UNPACKED), graph(config)
    lengths_B = jnp.array([len(inputs) for inputs, _ in PAIRS], jnp.int32)
    prompt = Prompt(inputs_BI=batch.inputs_BI, lengths_B=lengths_B, starts_B=jnp.zeros_like(lengths_B))

    @jax.jit
    def forced(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        first, cache = model.decode(batch.decoder_inputs_BT[:, :1], model.prefill(prompt, max_new_tokens=2))
        second, cache = model.decode(batch.decoder_inputs_BT[:, 1:2], cache)
        return jnp.concatenate([first, second], axis=1) @ model.head()

    real = batch.target_segments_BT[:, :2, None] > 0  # one example has no targets
    close(jnp.where(real, forced(params), 0), alone[:, :2], 1e-5)


@pytest.mark.parametrize(
    ("parameters", "input_attention"),
    [
        ("separate", "bidirectional"),
        ("shared", "causal"),
        pytest.param("separate", "causal", marks=pytest.mark.slow),
        pytest.param("shared", "bidirectional", marks=pytest.mark.slow),
    ],
)
def test_input_attention_decides_whether_inputs_see_later_ones(parameters: Any, input_attention: Any) -> None:
    """If inputs are causal, a later input does not affect an earlier one's stream."""
    config = t5like(ROPE, **LAYERS, parameters=parameters, input_attention=input_attention)
    graphdef, params = graph(config), random_params(config)
    within = rows_of([[(list(range(100, 106)), [1, 2])]], 6, 4)

    def stream(table: jax.Array) -> jax.Array:
        """The third input after the encoder's first layer."""
        model = nnx.merge(graphdef, {**params, "embedding": {"table_VD": table}})
        visibility = model._input_visibility(within.input_segments_BI, within.input_positions_BI)
        x_BID = model._embed(within.inputs_BI, within.input_positions_BI)
        layers, state = nnx.split(model.encoder)
        first = nnx.merge(layers, jax.tree.map(lambda x: x[0], state))
        return (first.encode(x_BID, visibility)[0][0, 2] ** 3).sum()

    seen = np.abs(np.asarray(jax.jit(jax.grad(stream))(params["embedding"]["table_VD"]))).sum(axis=1)[100:106]
    assert (seen[:3] > 0).all()
    assert (seen[3:] > 0).all() == (config.input_attention == "bidirectional")
    assert (seen[3:] == 0).all() == (config.input_attention == "causal")


@all_combinations
def test_the_ledger_counts_the_lowered_program(switches: dict[str, str]) -> None:
    """Counts agree exactly with scanned layers: no layer runs whose output nothing reads."""
    execution = dataclasses.replace(F32, attention="plain", scan_layers=True)
    config = t5like(ROPE, encoder_layers=3, decoder_layers=3, **switches)
    rows, lengths = 4, (48, 32)
    graphdef = graph(config, execution)

    def step(params: Any, batch: Batch) -> Any:
        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params)
            return cross_entropy(model.hidden(batch), model.head(), batch.targets_BT, batch.weights_BT, 0.0, 64, True)[
                0
            ]

        return jax.grad(loss)(params)

    shapes = skeleton(builder(config, execution)).shapes
    batch = jax.eval_shape(lambda: random_rows(rows, *lengths))
    counted = product_flops(parse_lowered(jax.jit(step).lower(shapes, batch)))
    assert counted == config.flops(LengthSums.of_rows(rows, *lengths)).train_full_attention


@pytest.mark.parametrize(("rung", "layers"), [pytest.param(3, 3, marks=pytest.mark.slow), (4, 1)])
def test_scanned_and_unrolled_layers_agree(rung: int, layers: int) -> None:
    """Covers the last encoder layer, which runs outside the scan: in training with remat, and in a prompt's cache."""
    config = t5like(ROPE, encoder_layers=layers, decoder_layers=layers, **RUNGS[rung])
    params, batch = random_params(config), random_rows(4)
    scanned = dataclasses.replace(F32, scan_layers=True, remat="full")
    close(results(config, params, batch, scanned), results(config, params, batch), 1e-5)
    lengths_B = (batch.input_segments_BI == 1).sum(axis=1).astype(jnp.int32)
    prompt = Prompt(inputs_BI=batch.inputs_BI, lengths_B=lengths_B, starts_B=jnp.zeros_like(lengths_B))

    def caches(execution: Execution) -> Any:
        model = nnx.merge(graph(config, execution), params)
        return model.prefill(prompt, max_new_tokens=2).layers

    unrolled = jax.tree.map(lambda *items: jnp.stack(items), *jax.jit(lambda: caches(F32))().items)
    close(jax.jit(lambda: caches(scanned))(), unrolled, 1e-5)


def test_the_relaxed_encoder_decoder_costs_as_much_as_the_decoder_only_model() -> None:
    """By causal-half FLOPs, and except for the last layer's work on inputs, which nothing reads."""
    text = LengthSums.of_rows(1, 48, 32)
    sizes = {"d_model": 8, "d_ff": 16}
    relaxed = t5like(ROPE, encoder_layers=3, decoder_layers=3, **RUNGS[4], **sizes).flops(text)
    decoder_only = gpt(num_layers=3, **sizes).flops(text)
    one_layer = gpt(num_layers=1, vocab_size=VOCAB, **sizes)
    query_out_and_mlp = 2 * 48 * (2 * 8 * 4 * 8 + 3 * 8 * 16)
    triangle = 4 * 4 * 8 * 48 * 48 // 2
    assert one_layer.flops(text).dense > query_out_and_mlp
    assert relaxed.dense == decoder_only.dense - query_out_and_mlp
    assert relaxed.attention_causal_half == decoder_only.attention_causal_half - triangle


@pytest.mark.parametrize("switches", [{"parameters": "shared"}, {"memory": "layerwise"}], ids=["shared", "layerwise"])
def test_switches_need_equal_depth(switches: dict[str, str]) -> None:
    with pytest.raises(UserError, match="need equally many of both; nearest: 2"):
        T5LikeConfig(**{**dataclasses.asdict(t5like()), "recipe": ROPE, "encoder_layers": 1, **switches})
