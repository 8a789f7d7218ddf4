"""Where a training step's time goes, for any arm of an experiment.

Legend: B rows, Q and K query and key slots, I input slots, T target slots, L = I + T, D model, V vocab.
"""

import dataclasses
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.decoder import Spread
from common.data.batch import Batch
from common.data.examples import RecordExamples
from common.data.loader import Loader
from common.data.objectives.config import Supervised
from common.data.packing import RowPlans
from common.data.tokenized.token_store import TokenStream
from common.kernels.visibility import Visibility
from common.nn.attention import Attention
from common.nn.layers import MLP, RMSNorm
from common.nn.loss import cross_entropy
from common.nn.parameters import Initialisers
from common.recipe import Execution
from common.train.programs import make_programs
from common.train.state import TrainState, init_state
from common.train.step import weighted_loss
from experiments.config import Experiment, ModelConfig
from experiments.running.pipeline import compiled_step, make_setup
from gpt.config import GptConfig
from t5like.config import T5LikeConfig

Program = Callable[[], Any]
TEXTS, LONGEST = 4096, 48
"""Made-up texts, and their tokens at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """One arm's step. Shares are of the step's median."""

    parameters: int
    step_seconds: Spread
    slots_per_second: Spread
    ledger_flops_per_second: Spread
    compile_seconds: float
    shares: dict[str, float]
    """Forward and optimizer (each compiled by itself), backward (the rest): they add up to 1."""
    alone: dict[str, float]
    """All branches of a kind, forward and backward, compiled and timed by themselves: near what they take inside."""


def time_loader(experiment: Experiment, count: int) -> tuple[Batch, Spread]:
    """A batch of made-up texts, and the seconds that one thread takes to build one (`count` are timed)."""
    with tempfile.TemporaryDirectory() as folder:
        loader = _random_loader(experiment, Path(folder))
        batch = loader.batch(0).batch  # makes the plan
        seconds = [_timed(partial(loader.batch, step)) for step in range(1, count + 1)]
    return batch, Spread.of(seconds)


def _random_loader(experiment: Experiment, folder: Path) -> Loader:
    config, rng = experiment.data, np.random.default_rng(0)
    vocab_size = min(arm.model.vocab_size for arm in experiment.arms.values())
    records = {
        side: TokenStream.of(rng.integers(0, vocab_size, length) for length in rng.integers(4, LONGEST, TEXTS))
        for side in ("inputs", "targets")
    }
    examples = RecordExamples(
        records,
        objective=Supervised(),
        seed=config.seed,
        tokenizer=types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash="random"),
        source_content_id="random",
    )
    plans = RowPlans(
        examples,
        input_limit=config.input_length,
        target_limit=config.target_length,
        seed=config.seed,
        cache_dir=folder,
    )
    return Loader(examples, plans, rows=config.rows)


def time_arm(
    experiment: Experiment, name: str, host: Batch, rounds: int, steps: int, advance: Callable[[int], None]
) -> Parts:
    """`rounds` rounds, in each of which every program runs `steps` times, so that a busy machine slows them alike."""
    arm, execution = experiment.arms[name], experiment.train.execution
    setup = make_setup(experiment, arm)
    programs = make_programs(setup)
    begun = time.perf_counter()
    step = compiled_step(experiment, arm)
    compile_seconds = time.perf_counter() - begun

    @jax.jit
    def forward(params: Any, batch: Batch) -> jax.Array:
        return weighted_loss(programs.model, params, batch, execution, arm.model.recipe.z_loss, None)[0]

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = programs.optimizer.update(grads, state.opt_state, state.params)
        return TrainState(step=state.step, params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    with jax.set_mesh(programs.mesh):
        states = {
            name: init_state(programs.model, programs.optimizer, experiment.train.seed, programs.shardings)
            for name in ("step", "optimizer")
        }
        grads = jax.tree.map(jnp.ones_like, states["optimizer"].params)
        batch = programs.put(host)

        def train_step() -> Any:
            states["step"], metrics = step(states["step"], batch)
            return metrics

        def update_step() -> Any:
            states["optimizer"] = update(states["optimizer"], grads)
            return states["optimizer"]

        whole: dict[str, Program] = {
            "step": train_step,
            "forward": lambda: forward(states["step"].params, batch),
            "optimizer": update_step,
        }
        branches = _branches(arm.model, execution, batch)
        timed = _measure(whole | branches, rounds, steps, advance)
    median = {name: float(np.median(seconds)) for name, seconds in timed.items()}
    spread = Spread.of(timed["step"])
    rows, inputs, targets = setup.row_slots
    return Parts(
        parameters=arm.model.param_count(),
        step_seconds=spread,
        slots_per_second=spread.over(rows * (inputs + targets)),
        ledger_flops_per_second=spread.over(setup.flops_per_step()),
        compile_seconds=compile_seconds,
        shares={
            "forward and loss": median["forward"] / median["step"],
            "backward": 1 - (median["forward"] + median["optimizer"]) / median["step"],
            "optimizer": median["optimizer"] / median["step"],
        },
        alone={name: median[name] / median["step"] for name in branches},
    )


def _measure(
    programs: dict[str, Program], rounds: int, steps: int, advance: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds a call, one number a round; compiled and warm before the first."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for run in programs.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in programs.items():
            seconds[name].append(sum(_timed(run) for _ in range(steps)) / steps)
        advance(1)
    return seconds


def _timed(run: Program) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - begun


Slots = tuple[jax.Array, jax.Array]
"""Segments and positions."""


def _branches(config: ModelConfig, execution: Execution, batch: Batch) -> dict[str, Program]:
    """Forward and backward of the model's branches, all of one kind in a row, each with its norm and residual."""
    inputs = jnp.asarray(batch.input_segments_BI), jnp.asarray(batch.input_positions_BI)
    targets = jnp.asarray(batch.target_segments_BT), jnp.asarray(batch.target_positions_BT)
    both = (jnp.concatenate([inputs[0], targets[0]], axis=1), jnp.concatenate([inputs[1], targets[1]], axis=1))
    attention, mlp = partial(_attention, config, execution), partial(_mlp, config, execution)
    match config:
        case GptConfig(num_layers=n):
            branches = {"attention": attention(n, both, causal=True), "MLP": mlp(n, both)}
        case T5LikeConfig(encoder_layers=n, decoder_layers=m):
            branches = {
                "encoder attention": attention(n, inputs, causal=False),
                "encoder MLP": mlp(n, inputs),
                "decoder attention": attention(m, targets, causal=True),
                "cross-attention": attention(m, targets, causal=False, memory=inputs),
                "decoder MLP": mlp(m, targets),
            }
    return branches | {"head and loss": _head(config, execution, batch)}


def _attention(
    c: ModelConfig, execution: Execution, layers: int, slots: Slots, *, causal: bool, memory: Slots | None = None
) -> Program:
    """Self-attention, or cross-attention to a fixed `memory`."""
    block = Attention(c, execution, _init(c, layers), rngs=nnx.Rngs(0))
    segments_BK, positions_BK = slots if memory is None else memory
    visibility = Visibility(
        q_segments_BQ=slots[0],
        k_segments_BK=segments_BK,
        q_positions_BQ=slots[1],
        k_positions_BK=positions_BK,
        causal=causal,
    )

    def apply(block: Attention, h_BQD: jax.Array, memory_BKD: jax.Array | None) -> jax.Array:
        keys_BKD = h_BQD if memory_BKD is None else memory_BKD
        return block(h_BQD, block.keys_values(keys_BKD, positions_BK), visibility)

    memory_BKD = None if memory is None else _stream(segments_BK.shape, c, execution)
    return _forward_backward(c, block, layers, apply, _stream(slots[0].shape, c, execution), memory_BKD)


def _mlp(c: ModelConfig, execution: Execution, layers: int, slots: Slots) -> Program:
    block = MLP(c, execution, _init(c, layers), rngs=nnx.Rngs(0))
    x_BLD = _stream(slots[0].shape, c, execution)
    return _forward_backward(c, block, layers, lambda block, h_BLD, _: block(h_BLD), x_BLD, None)


def _head(c: ModelConfig, execution: Execution, batch: Batch) -> Program:
    h_BTD = _stream(batch.targets_BT.shape, c, execution)
    w_DV = jax.random.normal(jax.random.key(1), (c.d_model, c.vocab_size)) / c.d_model

    def loss(h_BTD: jax.Array, w_DV: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        chunk, unroll = execution.loss_chunk, not execution.scan_layers
        return cross_entropy(h_BTD, w_DV, batch.targets_BT, batch.weights_BT, c.recipe.z_loss, chunk, unroll)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    return lambda: gradient(h_BTD, w_DV, batch)


def _init(c: ModelConfig, layers: int) -> Initialisers:
    return Initialisers(c.recipe, residual_branches=layers)


def _stream(shape: tuple[int, ...], c: ModelConfig, execution: Execution) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (*shape, c.d_model), jnp.dtype(execution.dtype))


def _forward_backward(
    c: ModelConfig,
    block: nnx.Module,
    layers: int,
    apply: Callable[[Any, jax.Array, jax.Array | None], jax.Array],
    x_BLD: jax.Array,
    memory_BKD: jax.Array | None,
) -> Program:
    """`layers` times `x + apply(block, norm(x), memory)` in one program, and gradients from some gradient of the end.

    All layers have the same weights, which costs what different ones do.
    """
    graphdef, params = nnx.split((RMSNorm(c.d_model, c.recipe.norm_epsilon, rngs=nnx.Rngs(0)), block))

    def stack(params: Any, x_BLD: jax.Array, memory_BKD: jax.Array | None) -> jax.Array:
        norm, block = nnx.merge(graphdef, params)
        for _ in range(layers):
            x_BLD = x_BLD + apply(block, norm(x_BLD), memory_BKD)
        return x_BLD

    @jax.jit
    def both(params: Any, x_BLD: jax.Array, memory_BKD: jax.Array | None) -> Any:
        out_BLD, pull = jax.vjp(stack, params, x_BLD, memory_BKD)
        return pull(out_BLD)

    return lambda: both(params, x_BLD, memory_BKD)
