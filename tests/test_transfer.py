"""Coordinate checks, decoder-only: under CompleteP, steps change wide and deep models as much as small ones.

The task is to translate each input token by a fixed permutation. Sizes are tiny, so that each program runs in seconds.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.data.batch import Batch
from common.model import skeleton
from common.nn.parametrization import update_scales
from common.recipe import CompleteP, Execution, Parametrization, Recipe, Standard
from common.train.config import AdamW
from common.train.optimizer import make_optimizer
from common.train.state import TrainState
from common.train.step import Numbers, make_train_step
from experiments.families import GPT, builder

pytestmark = pytest.mark.slow

VOCAB, ROWS, LENGTH = 64, 8, 8
WIDTH, LAYERS, HEAD_DIM = 16, 2, 8
WIDER = DEEPER = 8
STANDARD, COMPLETEP = Standard(), CompleteP(base_width=WIDTH, base_layers=LAYERS, base_head_dim=HEAD_DIM)
RATES = (2.0**-8, 2.0**-6)
EXECUTION = Execution(dtype="float32", loss_chunk=4096)
FAMILIES: dict[str, tuple[Any, dict[str, str]]] = {
    "gpt": (GPT, {}),
}
families = pytest.mark.parametrize("family", FAMILIES)


class Trained(NamedTuple):
    """What training changed, and how well it went; an entry per learning rate."""

    stream: np.ndarray
    """RMS of the change of the residual stream before the final norm."""
    logits: np.ndarray
    losses: np.ndarray
    """Mean loss over the second half of the steps."""


def translations(key: jax.Array) -> Batch:
    """Random inputs, whose targets are their images under a permutation that is always the same."""
    inputs_BI = jax.random.randint(key, (ROWS, LENGTH), 2, VOCAB)
    targets_BT = jnp.asarray(np.random.default_rng(0).permutation(VOCAB))[inputs_BI]
    ones = jnp.ones((ROWS, LENGTH), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None], ones.shape)
    return Batch(
        inputs_BI=inputs_BI,
        input_segments_BI=ones,
        input_positions_BI=places,
        decoder_inputs_BT=jnp.pad(targets_BT, ((0, 0), (1, 0)))[:, :-1],
        targets_BT=targets_BT,
        target_segments_BT=ones,
        target_positions_BT=places + LENGTH,
        weights_BT=ones.astype(jnp.float32),
    )


@functools.cache
def trained(
    family: str, width: int, layers: int, rule: Parametrization, rates: tuple[float, ...], steps: int
) -> Trained:
    """Trains a fresh model at each rate, all in one program."""
    kind, switches = FAMILIES[family]
    recipe = Recipe(parametrization=rule)
    sizes = {"width": width, "layers": layers, "head_dim": HEAD_DIM, "vocab_size": VOCAB}
    model = skeleton(builder(kind.sized(**sizes, recipe=recipe, **switches), EXECUTION))
    scales = update_scales(rule, model.logical_axes, model.shapes)

    def optimizer(rate: Any) -> Any:
        return make_optimizer(AdamW(), lambda _: rate, model.logical_axes, scales)

    step = make_train_step(model, optimizer, execution=EXECUTION, z_loss=0.0, accumulation=1)

    def views(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        plain: Any = model.merge(params)
        logits_BTV = plain.hidden(batch) @ plain.head()
        bare: Any = model.merge(params)
        setattr(bare, "final_norm" if family == "gpt" else "decoder_norm", lambda x_BTD: x_BTD)
        return bare.hidden(batch) / bare.output.scale, logits_BTV

    def at(rate: jax.Array) -> tuple[jax.Array, ...]:
        params = nnx.to_pure_dict(nnx.state(model.build(nnx.Rngs(params=jax.random.key(0)))))
        state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer(rate).init(params))

        def advance(state: TrainState, number: jax.Array) -> tuple[TrainState, jax.Array]:
            batch = translations(jax.random.fold_in(jax.random.key(1), number))
            state, metrics = step(state, batch, Numbers(seed=jnp.uint32(0), learning_rate=rate))
            return state, metrics["loss"]

        state, losses = jax.lax.scan(advance, state, jnp.arange(steps))
        probe = translations(jax.random.key(2))
        pairs = zip(views(params, probe), views(state.params, probe), strict=True)
        changes = (jnp.sqrt(jnp.mean(jnp.square(after - before))) for before, after in pairs)
        return *changes, losses[steps // 2 :].mean()

    return Trained(*map(np.asarray, jax.jit(jax.vmap(at))(jnp.array(rates, jnp.float32))))


@families
def test_steps_change_a_wide_model_as_much_as_a_small_one(family: str) -> None:
    base, wide, by_rule = (trained(family, *sizes, RATES, 5) for sizes in ((WIDTH, LAYERS, STANDARD), *pair(wide=True)))
    assert (wide.stream > 2 * base.stream).all() and (wide.logits > 1.5 * base.logits).all()
    assert within(by_rule.stream / base.stream) and (by_rule.logits < base.logits).all()


@families
def test_steps_change_a_deep_model_as_much_as_a_shallow_one(family: str) -> None:
    base, deep, by_rule = (
        trained(family, *sizes, RATES, 5) for sizes in ((WIDTH, LAYERS, STANDARD), *pair(wide=False))
    )
    assert (deep.stream > 2 * base.stream).all()
    assert within(by_rule.stream / base.stream)


def pair(wide: bool) -> tuple[tuple[int, int, Parametrization], ...]:
    """Returns sizes eight times the base's, without and with the rule."""
    width, layers = (WIDER * WIDTH, LAYERS) if wide else (WIDTH, DEEPER * LAYERS)
    return (width, layers, STANDARD), (width, layers, COMPLETEP)


def within(ratios: np.ndarray) -> bool:
    """Returns whether a change neither grows with the size nor vanishes: by less than a factor of 2 for one of 8."""
    return bool((ratios > 0.5).all() and (ratios < 1.25).all())
