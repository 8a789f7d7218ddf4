"""What both families promise: counts, causality, no leaks, packing, caches."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.compute.moments import Moments
from common.compute.xla import dot_flops
from common.data.batch import Batch
from common.infer.decode import make_greedy
from common.infer.prompt import Prompt
from common.nn.loss import cross_entropy
from common.nn.recipe import Execution
from common.train.config import AdamW, Linear
from common.train.optimizer import make_optimizer, make_schedule
from common.train.state import TrainState, skeleton
from common.train.step import make_train_step
from experiments.config import ModelConfig
from experiments.families import builder
from t5like.config import SIZES
from tests.helpers import (
    BIAS,
    F32,
    FAMILIES,
    PAIRS,
    VOCAB,
    Pair,
    close,
    gpt,
    logits,
    random_rows,
    rows_of,
    run,
    split,
    t5like,
)
from tests.tiny import QUICK, jax_settings


@pytest.fixture(autouse=True)
def quick_compilation() -> Iterator[None]:
    """These tests compile much and compute little."""
    with jax_settings(QUICK):
        yield


families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
# For what compiles many programs and depends on no recipe.
SIBLINGS = ("gpt-rope", "t5like-bias")
siblings = pytest.mark.parametrize("config", [FAMILIES[name] for name in SIBLINGS], ids=SIBLINGS)


@families
def test_parameters_are_counted_to_the_unit(config: ModelConfig) -> None:
    _, params = split(config)
    assert sum(x.size for x in jax.tree.leaves(params)) == config.param_count()


@pytest.mark.parametrize(("size", "count"), [("t5-v1.1-small", 76_961_152), ("t5-v1.1-base", 247_577_856)])
def test_t5_sizes(size: str, count: int) -> None:
    model = skeleton(builder(SIZES[size], Execution()))
    assert SIZES[size].param_count() == count == sum(x.size for x in jax.tree.leaves(model.shapes))


@families
def test_ledger_is_xlas_count(config: ModelConfig) -> None:
    # Counted on plain attention: the blocked one skips and recomputes.
    execution = dataclasses.replace(F32, attention="plain")
    rows, lengths = 4, (48, 32)
    model = skeleton(builder(config, execution))
    optimizer = make_optimizer(AdamW(), make_schedule(Linear(), 1e-3, 10), model.logical_axes)
    step = make_train_step(model, optimizer, execution=execution, z_loss=0.0, accumulation=1, seed=0)
    params = model.shapes
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32), params=params, opt_state=jax.eval_shape(optimizer.init, params)
    )
    batch = jax.eval_shape(lambda: random_rows(rows, *lengths))
    with jax_settings({"jax_disable_most_optimizations": False}):  # dead products must go
        counted = dot_flops(jax.jit(step).lower(state, batch).compile().as_text())
    ledger = config.flops(Moments.of_rows(rows, *lengths)).train_full_attention
    assert counted == pytest.approx(ledger, rel=0.02)


def test_conventions_by_hand() -> None:
    """Model width 1, one head of 2: every term can be counted on fingers."""
    text = Moments.of_rows(1, 3, 2)
    small = {"vocab_size": 7, "d_model": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "d_ff": 1}
    flops = gpt(num_layers=1, **small).flops(text)
    # 4 x 2 attention and 3 MLP weights on 5 tokens, the head's 7 on 2; 25 pairs, 8 a pair for scores and values.
    assert (flops.dense, flops.attention_full, flops.attention_causal_half) == (2 * (5 * 11 + 2 * 7), 8 * 25, 4 * 25)
    prefix = gpt(num_layers=1, input_attention="bidirectional", **small).flops(text)
    assert prefix.attention_causal_half == 8 * (25 + 9) / 2
    both = t5like(encoder_layers=1, decoder_layers=1, **small).flops(text)
    # Encoder 11 and cross keys and values 4 on 3 inputs; decoder 8 + 4 + 3 and the head 7 on 2 targets.
    assert both.dense == 2 * (3 * (11 + 4) + 2 * (15 + 7))
    assert both.attention_full == 8 * (9 + 4 + 6)
    assert both.attention_causal_half == 8 * (9 + 2 + 6)


@families
def test_causality_by_gradient(config: ModelConfig) -> None:
    """A target's hidden state depends on its own decoder input and earlier ones, and on no later one."""
    batch = rows_of([[([5, 6, 7], [8, 9, 10, 11, 12, 13])]], 4, 8)
    at = 3
    # Gradients with respect to the embedding of every decoder input, by way of a table with one row a slot.
    table = jax.random.normal(jax.random.key(1), (VOCAB, config.d_model))
    graphdef, params = split(config)
    distinct = dataclasses.replace(batch, decoder_inputs_BT=jnp.arange(100, 108, dtype=jnp.int32)[None])

    def hidden_at(table: jax.Array) -> jax.Array:
        changed = {**params, "embedding": {"table_VD": table}}
        return (nnx.merge(graphdef, changed).hidden(distinct)[0, at] * jnp.arange(1.0, config.d_model + 1)).sum()

    by_slot = np.abs(np.asarray(jax.jit(jax.grad(hidden_at))(table))[100:108]).sum(axis=1)
    assert (by_slot[at + 1 :] == 0).all()
    assert (by_slot[: at + 1] > 0).all()


@families
def test_inputs_are_seen_as_the_family_says(config: ModelConfig) -> None:
    """The first target depends on every input; whether an early input sees a later one is the family's choice."""
    batch = rows_of([[([5, 6, 7], [8, 9])]], 4, 4)
    graphdef, params = split(config)

    def first(table: jax.Array) -> jax.Array:
        return (nnx.merge(graphdef, {**params, "embedding": {"table_VD": table}}).hidden(batch)[0, 0] ** 3).sum()

    gradient = np.abs(np.asarray(jax.jit(jax.grad(first))(params["embedding"]["table_VD"]))).sum(axis=1)
    assert (gradient[[5, 6, 7]] > 0).all()
    if config.recipe.tied_embeddings is False:
        assert gradient[8] == 0  # the first target is predicted, not read


@families
def test_packing_and_padding_change_no_loss(config: ModelConfig) -> None:
    """Each example alone in its row, in longer rows, and packed with strangers: the same logits on its targets."""
    alone = logits(config, rows_of([[pair] for pair in PAIRS]))
    longer = logits(config, rows_of([[pair] for pair in PAIRS], 24, 20))
    packed = logits(config, rows_of([PAIRS]))[0]
    start = 0
    for row, (_, targets) in enumerate(PAIRS):
        n = len(targets)
        if n:
            close(packed[start : start + n], alone[row, :n], 1e-5)
            close(longer[row, :n], alone[row, :n], 1e-5)
        start += n


@families
def test_no_leak_between_packed_segments(config: ModelConfig) -> None:
    """A stranger whose embedding is huge leaves its neighbours' logits and gradients bit-equal."""
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
        return cross_entropy(model.hidden(batch), model.head(), batch.targets_BT, weights, 0.0, 8, True)[0]

    table = params["embedding"]["table_VD"]
    planted = table.at[120:124].set(1e4)
    plain, huge = (jax.jit(jax.value_and_grad(loss))(t) for t in (table, planted))
    assert float(plain[0]) == float(huge[0])
    assert (np.asarray(huge[1])[120:124] == 0).all()
    assert (np.asarray(plain[1])[:120] == np.asarray(huge[1])[:120]).all()


@siblings
@pytest.mark.parametrize(
    "execution",
    [
        dataclasses.replace(F32, scan_layers=True),
        dataclasses.replace(F32, remat="full", attention="plain"),
        dataclasses.replace(F32, remat="dots", scan_layers=True, loss_chunk=5),
    ],
    ids=["scan", "remat-plain", "scan-remat-dots"],
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
    """Teacher-forced logits through the cache, for prompts of unequal length in one batch, an empty one among them."""
    pairs: list[Pair] = [([5, 6, 0, 7, 1], [8, 0, 9, 1]), ([], [3, 4, 7, 1]), ([11, 1], [13, 2, 5, 1])]
    batch = rows_of([[pair] for pair in pairs], 8, 4)
    lengths = jnp.array([len(inputs) for inputs, _ in pairs], jnp.int32)

    def forced(model: Any, batch: Batch) -> jax.Array:
        cache = model.prefill(Prompt(inputs_BI=batch.inputs_BI, lengths_B=lengths), max_new_tokens=4)
        steps = []
        for t in range(4):
            h_BD, cache = model.decode(batch.decoder_inputs_BT[:, t], cache)
            steps.append(h_BD @ model.head())
        return jnp.stack(steps, axis=1)

    close(run(config, forced, batch), logits(config, batch), 1e-5)


@siblings
def test_greedy_is_argmax_by_argmax(config: ModelConfig) -> None:
    """Decoding in one program equals recomputing everything for every token, whatever the company in the batch."""
    texts, start, eos = [[5, 6, 0, 7], [], [11, 3]], 0, 1
    skeletal = skeleton(builder(config, F32))
    _, params = split(config)
    inputs = np.zeros((3, 6), np.int32)
    for row, text in enumerate(texts):
        inputs[row, : len(text)] = text
    prompt = Prompt(inputs_BI=jnp.array(inputs), lengths_B=jnp.array([4, 0, 2], jnp.int32))
    found = np.asarray(make_greedy(skeletal, max_new_tokens=5, start_id=start, eos_id=eos)(params, prompt))
    for row, text in enumerate(texts):
        written: list[int] = []
        while len(written) < 5 and eos not in written:
            batch = rows_of([[(text, [*written, 0])]], 6, 6)
            written.append(int(logits(config, batch)[0, len(written)].argmax()))
        assert found[row].tolist() == (written + [eos] * 5)[:5]


def test_greedy_stops_at_eos() -> None:
    """A head that can only say eos ends every row at once, and the rest is filled with it."""
    config = gpt()
    model = skeleton(builder(config, F32))
    _, params = split(config)
    params = {**params, "output": {"weight_DV": jnp.zeros_like(params["output"]["weight_DV"])}}
    greedy = make_greedy(model, max_new_tokens=4, start_id=0, eos_id=0)
    prompt = Prompt(inputs_BI=jnp.ones((2, 3), jnp.int32), lengths_B=jnp.array([3, 1], jnp.int32))
    assert (np.asarray(greedy(params, prompt)) == 0).all()


@pytest.mark.parametrize("vocab", [128, 1024])
@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_model_is_almost_uniform(vocab: int, tied: bool) -> None:
    recipe = dataclasses.replace(gpt().recipe, tied_embeddings=tied)
    config = gpt(recipe, vocab_size=vocab, d_model=128, num_heads=4, num_kv_heads=4, head_dim=32, d_ff=256)
    batch = random_rows(8)

    def loss(model: Any, batch: Batch) -> jax.Array:
        return cross_entropy(model.hidden(batch), model.head(), batch.targets_BT, batch.weights_BT, 0.0, 16, True)[0]

    total = run(config, loss, batch)
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
    """Standard deviations measured on T5X's own initialisers."""
    sizes = {"vocab_size": 512, "d_model": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 32, "d_ff": 320}
    _, leaf = split(t5like(BIAS, **sizes))
    for key in path:
        leaf = leaf[key]
    tolerance = 4 * std / math.sqrt(2 * leaf.size)
    assert float(jnp.std(leaf)) == pytest.approx(std, abs=tolerance)


@siblings
def test_dropout_is_off_without_a_key_and_shared_along_the_length(config: ModelConfig) -> None:
    dropped = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, dropout=0.5))
    batch = rows_of([[([5, 6, 7], list(range(20, 36)))], [([9], list(range(40, 56)))]])  # no padded target slots

    def hidden(config: ModelConfig, *key: jax.Array) -> jax.Array:
        return run(config, lambda model, *args: model.hidden(*args), batch, *key)

    assert (np.asarray(hidden(dropped)) == np.asarray(hidden(config))).all()
    first, again, other = (hidden(dropped, jax.random.key(k)) for k in (0, 0, 1))
    assert (np.asarray(first) == np.asarray(again)).all()
    assert not np.allclose(first, other)
    # The last dropout's mask has no length axis: a feature is dropped on a whole row or nowhere.
    zero = np.asarray(first == 0)
    assert (zero.all(axis=1) == zero.any(axis=1)).all()
    assert 0.3 < zero.mean() < 0.7
