"""Properties that every family has: exact counts, causality, no leaks between packed examples, exact caches."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gpt.config as gpt_config
import t5like.config as t5like_config
from common.compute.hlo import parse_lowered
from common.compute.length_sums import LengthSums
from common.compute.traffic import product_flops
from common.data.batch import Batch, Prompt
from common.model import skeleton
from common.nn.loss import cross_entropy
from common.recipe import Execution
from common.train.config import AdamW
from common.train.optimizer import make_optimizer
from common.train.state import TrainState
from common.train.step import make_train_step
from experiments.families import ModelConfig, builder
from tests.helpers import (
    BIAS,
    F32,
    FAMILIES,
    PAIRS,
    VOCAB,
    Pair,
    close,
    families,
    fresh,
    gpt,
    logits,
    random_rows,
    representative,
    rows_of,
    run,
    split,
    t5like,
)
from tests.tiny import numbers

# For tests that compile many programs and do not depend on the recipe.
SIBLINGS = ("gpt-rope", "t5like-bias")
siblings = pytest.mark.parametrize("config", [FAMILIES[name] for name in SIBLINGS], ids=SIBLINGS)


@families
def test_param_count_is_exact(config: ModelConfig) -> None:
    _, params = split(config)
    assert sum(x.size for x in jax.tree.leaves(params)) == config.param_count()


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("t5-v1.0-small", 60_506_624),
        ("t5-v1.0-base", 222_903_552),
        ("t5-v1.0-large", 737_668_096),
        ("t5-v1.0-3b", 2_851_598_336),
        ("t5-v1.0-11b", 11_307_321_344),
        ("t5-v1.1-small", 76_961_152),
        ("t5-v1.1-base", 247_577_856),
        ("t5-v1.1-large", 783_150_080),
        ("t5-v1.1-xl", 2_849_757_184),
        ("t5-v1.1-xxl", 11_135_332_352),
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-1.1b", 1_100_048_384),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("t5x-decoder-base", 109_628_544),
        ("t5x-decoder-large", 341_231_104),
        ("t5x-decoder-xl", 1_223_527_424),
        ("t5x-decoder-xxl", 4_762_310_656),
    ],
)
def test_published_sizes(size: str, count: int) -> None:
    config: ModelConfig = {**gpt_config.SIZES, **t5like_config.SIZES}[size]
    shapes = skeleton(builder(config, Execution())).shapes
    # Multiplied as Python integers: JAX's would overflow.
    assert config.param_count() == count == sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "scan_layers", "lengths"),
    [
        *(representative(name, True, (48, 32), name=name) for name in FAMILIES),
        *((name, False, (48, 32)) for name in SIBLINGS),
        *((name, True, (0, 32)) for name in SIBLINGS),
        pytest.param("t5like-learned", True, (0, 32), marks=pytest.mark.slow),
    ],
)
def test_the_ledger_counts_the_lowered_program(name: str, scan_layers: bool, lengths: tuple[int, int]) -> None:
    """Counts agree exactly with plain attention (blocked attention skips and recomputes), with and without inputs."""
    config = FAMILIES[name]
    execution = dataclasses.replace(F32, attention="plain", scan_layers=scan_layers)
    rows = 4
    model = skeleton(builder(config, execution))
    optimizer = make_optimizer(AdamW(), lambda _: 1e-3, model.logical_axes)
    step = make_train_step(model, lambda _: optimizer, execution=execution, z_loss=0.0, accumulation=1)
    params = model.shapes
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32), params=params, opt_state=jax.eval_shape(optimizer.init, params)
    )
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, lengths[x.shape[1] == 1]), x.dtype), rows_of([[]], 0, 1))
    counted = product_flops(parse_lowered(jax.jit(step).lower(state, batch, numbers(1e-3))))
    assert counted == config.flops(LengthSums.of_rows(rows, *lengths)).train_full_attention


def test_conventions_by_hand() -> None:
    """With model width 1 and one head of 2 every term can be counted by hand."""
    text = LengthSums.of_rows(1, 3, 2)
    small = {"vocab_size": 7, "d_model": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "d_ff": 1}
    flops = gpt(num_layers=1, **small).flops(text)
    # 4 x 2 attention and 3 MLP weights on 5 tokens, the head's 7 on 2; 25 pairs, 8 FLOPs each for scores and values.
    assert (flops.dense, flops.attention_full, flops.attention_causal_half) == (2 * (5 * 11 + 2 * 7), 8 * 25, 4 * 25)
    prefix = gpt(num_layers=1, input_attention="bidirectional", **small).flops(text)
    assert prefix.attention_causal_half == 8 * (25 + 9) / 2
    both = t5like(encoder_layers=1, decoder_layers=1, **small).flops(text)
    # Encoder 11 and cross keys and values 4 on 3 inputs; decoder 8 + 4 + 3 and the head 7 on 2 targets.
    assert both.dense == 2 * (3 * (11 + 4) + 2 * (15 + 7))
    assert both.attention_full == 8 * (9 + 4 + 6)
    assert both.attention_causal_half == 8 * (9 + 2 + 6)


@functools.cache
def table_gradient(config: ModelConfig) -> Callable[[jax.Array, Batch, int], np.ndarray]:
    """Returns a program for the gradient, by the token table, of a weighted sum of one slot's hidden state."""
    graphdef, params = split(config)

    def hidden_at(table: jax.Array, batch: Batch, at: jax.Array) -> jax.Array:
        changed = {**params, "embedding": {"table_VD": table}}
        return (nnx.merge(graphdef, changed).hidden(batch)[0, at] * jnp.arange(1.0, config.d_model + 1)).sum()

    program = jax.jit(jax.grad(hidden_at))
    return lambda table, batch, at: np.abs(np.asarray(program(table, batch, jnp.int32(at)))).sum(axis=1)


@families
def test_causality_by_gradient(config: ModelConfig) -> None:
    """A target's hidden state depends on its own and earlier decoder inputs, and not on later ones."""
    batch = rows_of([[([5, 6, 7], [8, 9, 10, 11, 12, 13])]], 4, 8)
    at = 3
    # Each decoder input has its own row of the token table, so the table's gradient has one row per slot.
    table = jax.random.normal(jax.random.key(1), (VOCAB, config.d_model))
    distinct = dataclasses.replace(batch, decoder_inputs_BT=jnp.arange(100, 108, dtype=jnp.int32)[None])
    by_slot = table_gradient(config)(table, distinct, at)[100:108]
    assert (by_slot[at + 1 :] == 0).all()
    assert (by_slot[: at + 1] > 0).all()


@families
def test_the_first_target_depends_on_every_input(config: ModelConfig) -> None:
    """The first target's hidden state depends on every input, and not on the target itself."""
    batch = rows_of([[([5, 6, 7], [8, 9])]], 4, 8)
    gradient = table_gradient(config)(split(config)[1]["embedding"]["table_VD"], batch, 0)
    assert (gradient[[5, 6, 7]] > 0).all()
    if config.recipe.tied_embeddings is False:
        assert gradient[8] == 0  # the first target is predicted, not an input


@families
def test_packing_and_padding_change_no_loss(config: ModelConfig) -> None:
    """An example has the same logits alone in its row, in a longer row, and packed with others."""
    alone = logits(config, rows_of([[pair] for pair in PAIRS]))
    longer = logits(config, rows_of([[pair] for pair in PAIRS], 24, 20))
    packed = logits(config, rows_of([PAIRS, [], [], []]))[0]  # as many rows as above: one program
    start = 0
    for row, (_, targets) in enumerate(PAIRS):
        n = len(targets)
        if n:
            close(packed[start : start + n], alone[row, :n], 1e-5)
            close(longer[row, :n], alone[row, :n], 1e-5)
        start += n


@pytest.mark.parametrize("name", [*SIBLINGS, pytest.param("t5like-relaxed", marks=pytest.mark.slow)])
def test_rows_may_have_no_input_slots(name: str) -> None:
    """A language model's rows have none. Logits, loss and gradients are those of rows with empty input slots."""
    config = FAMILIES[name]
    pairs: list[Pair] = [([], [5, 6, 0, 1]), ([], [7, 1])]
    graphdef, params = split(config)

    def loss(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        h_BTD, w_DV = model.hidden(batch), model.head()
        return cross_entropy(h_BTD, w_DV, batch.targets_BT, batch.weights_BT, 0.0, 64, True)[0], h_BTD @ w_DV

    program = jax.jit(jax.value_and_grad(loss, has_aux=True))
    none, some = (program(params, rows_of([pairs, pairs], slots, 8)) for slots in (0, 4))
    close(none, some, 1e-5)


@families
def test_no_leak_between_packed_segments(config: ModelConfig) -> None:
    """A neighbour with huge embeddings leaves other examples' loss and gradients equal to the bit."""
    stranger: Pair = ([120, 121], [122, 123, 1])
    others: list[Pair] = [([5, 6, 1], [7, 8, 1]), ([], [9, 1])]
    batch = rows_of([[others[0], stranger, others[1]]])
    graphdef, params = split(
        dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, tied_embeddings=False))
    )
    mine = (batch.target_segments_BT == 1) | (batch.target_segments_BT == 3)
    weights = mine.astype(jnp.float32)

    def loss(table: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, {**params, "embedding": {"table_VD": table}})
        return cross_entropy(model.hidden(batch), model.head(), batch.targets_BT, weights, 0.0, 64, True)[0]

    table = params["embedding"]["table_VD"]
    planted = table.at[120:124].set(1e4)
    program = jax.jit(jax.value_and_grad(loss))
    plain, huge = (program(t) for t in (table, planted))
    assert float(plain[0]) == float(huge[0])
    assert (np.asarray(huge[1])[120:124] == 0).all()
    assert (np.asarray(plain[1])[:120] == np.asarray(huge[1])[:120]).all()


@siblings
@pytest.mark.parametrize(
    "execution",
    [
        pytest.param(dataclasses.replace(F32, scan_layers=True), id="scan", marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(F32, remat="full", attention="plain"), id="remat-plain", marks=pytest.mark.slow
        ),
        pytest.param(dataclasses.replace(F32, remat="dots", scan_layers=True, loss_chunk=20), id="scan-remat-dots"),
    ],
)
def test_execution_changes_no_result(config: ModelConfig, execution: Execution) -> None:
    batch = random_rows(4)

    def gradients(execution: Execution) -> Any:
        graphdef, params = split(config, execution)

        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params)
            unroll = not execution.scan_layers
            args = (batch.targets_BT, batch.weights_BT, 1e-4, execution.loss_chunk, unroll)
            return cross_entropy(model.hidden(batch), model.head(), *args)[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    close(gradients(execution), gradients(F32), 1e-5)


@families
def test_cached_equals_uncached(config: ModelConfig) -> None:
    """Teacher-forced logits through the cache, for prompts of unequal length in one batch, one of them empty."""
    pairs: list[Pair] = [([5, 6, 0, 7, 1], [8, 0, 9, 1]), ([], [3, 4, 7, 1]), ([11, 1], [13, 2, 5, 1])]
    batch = rows_of([[pair] for pair in pairs], 8, 4)
    lengths = jnp.array([len(inputs) for inputs, _ in pairs], jnp.int32)

    def forced(model: Any, batch: Batch) -> jax.Array:
        prompt = Prompt(inputs_BI=batch.inputs_BI, lengths_B=lengths, starts_B=jnp.zeros_like(lengths))
        cache = model.prefill(prompt, max_new_tokens=4)
        steps = []
        for tokens in (slice(0, 1), slice(1, 3), slice(3, 4)):  # one at a time, and two at once
            h_BQD, cache = model.decode(batch.decoder_inputs_BT[:, tokens], cache)
            steps.append(h_BQD @ model.head())
        return jnp.concatenate(steps, axis=1)

    close(run(config, forced, batch), logits(config, batch), 1e-5)


@pytest.mark.parametrize(("tied", "vocab"), [(False, 1024), (True, 128)])
def test_a_fresh_model_is_almost_uniform(tied: bool, vocab: int) -> None:
    recipe = dataclasses.replace(gpt().recipe, tied_embeddings=tied)
    sizes = {"num_layers": 1, "d_model": 128, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "d_ff": 256}
    config = gpt(recipe, vocab_size=vocab, **sizes)
    batch = random_rows(8)

    def loss(model: Any, batch: Batch) -> jax.Array:
        return cross_entropy(model.hidden(batch), model.head(), batch.targets_BT, batch.weights_BT, 0.0, 64, True)[0]

    graphdef, params = fresh(config)
    total = jax.jit(lambda params: loss(nnx.merge(graphdef, params), batch))(params)
    assert float(total / batch.weights_BT.sum()) == pytest.approx(math.log(vocab), rel=0.05)


@pytest.mark.parametrize(
    ("path", "std"),
    [
        (("decoder", "attention", "query_DHC"), (256 * 32) ** -0.5),
        (("encoder", "attention", "key_DGC"), 256**-0.5),
        (("decoder", "cross_attention", "out_HCD"), (4 * 32) ** -0.5),
        (("encoder", "mlp", "in_DF"), 256**-0.5),
        (("decoder", "mlp", "out_FD"), 320**-0.5),
        (("embedding", "table_VD"), 1.0),
        (("output", "weight_DV"), 256**-0.5),
        (("encoder_bias", "table_HR"), (2 / (4 + 32)) ** 0.5),
    ],
    ids=lambda x: "/".join(x) if isinstance(x, tuple) else "",
)
def test_t5_initialisers(path: tuple[str, ...], std: float) -> None:
    """Expected standard deviations were measured on T5X's own initialisers."""
    sizes = {"vocab_size": 512, "d_model": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "d_ff": 320}
    _, leaf = fresh(t5like(BIAS, **sizes))
    for key in path:
        leaf = leaf[key]
    tolerance = 4 * std / math.sqrt(2 * leaf.size)
    assert float(jnp.std(leaf)) == pytest.approx(std, abs=tolerance)


@siblings
def test_dropout_needs_a_key_and_its_mask_has_no_length_axis(config: ModelConfig) -> None:
    dropped = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, dropout=0.5))
    batch = rows_of([[([5, 6, 7], list(range(20, 36)))], [([9], list(range(40, 56)))]])  # no padded target slots

    def hidden(model: Any, *args: Any) -> jax.Array:
        return model.hidden(*args)

    assert (np.asarray(run(dropped, hidden, batch)) == np.asarray(run(config, hidden, batch))).all()
    graphdef, params = split(dropped)
    with_key = jax.jit(lambda key: nnx.merge(graphdef, params).hidden(batch, key))
    first, again, other = (with_key(jax.random.key(k)) for k in (0, 0, 1))
    assert (np.asarray(first) == np.asarray(again)).all()
    assert not np.allclose(first, other)
    # The last dropout drops a feature in a whole row or not at all.
    zero = np.asarray(first == 0)
    assert (zero.all(axis=1) == zero.any(axis=1)).all()
    assert 0.3 < zero.mean() < 0.7
