"""Measures where the time of a training step goes, for any run.

Legend: B rows, Q and K query and key slots, I input slots, T target slots, L = I + T, D model, V vocab.
"""

import dataclasses
import resource
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
from common.data.config import DataConfig
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
from common.nn.parametrization import Scaling
from common.recipe import Execution
from common.train.programs import Programs, Setup, make_programs
from common.train.state import TrainState, init_state
from common.train.step import Numbers, weighted_loss
from experiments.families import ModelConfig, family_of
from experiments.run import Run
from experiments.running.pipeline import compiled_step, make_setup

Program = Callable[[], Any]
TEXTS, LONGEST = 4096, 48
"""Random texts, and the most tokens in one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Measurements of one run's step. Shares are fractions of the step's median time."""

    parameters: int
    step_seconds: Spread
    page_faults: float
    """Per step; glibc would take its temporary buffer from the kernel again, a page at a time (`common.allocator`)."""
    slots_per_second: Spread
    ledger_flops_per_second: Spread
    compile_seconds: float
    shares: dict[str, float]
    """Forward and optimizer, each compiled separately, and backward, which is the rest; they add up to 1."""
    alone: dict[str, float]
    """All layers' branches of one kind, forward and backward, compiled separately: about what they take in the step."""


def time_loader(data: DataConfig, vocab_size: int, count: int) -> tuple[Batch, Spread]:
    """A batch of random texts with ids below `vocab_size`, and the seconds that one takes, for `count` batches."""
    with tempfile.TemporaryDirectory() as folder:
        loader = _random_loader(data, vocab_size, Path(folder))
        batch = loader.batch(0).batch  # makes the plan
        seconds = [_timed(partial(loader.batch, step)) for step in range(1, count + 1)]
    return batch, Spread.of(seconds)


def _random_loader(config: DataConfig, vocab_size: int, folder: Path) -> Loader:
    rng = np.random.default_rng(0)
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


def time_step(run: Run, host: Batch, rounds: int, steps: int, advance: Callable[[int], None]) -> Parts:
    """Times every program `steps` times in each of `rounds` rounds, so that a busy machine slows all equally."""
    setup = make_setup(run)
    programs = make_programs(setup)
    begun = time.perf_counter()
    step = compiled_step(run)
    compile_seconds = time.perf_counter() - begun
    with jax.set_mesh(programs.mesh):
        batch = programs.put(host)
        whole = _whole_programs(setup, programs, step, batch)
        branches = _branches(run.model, run.train.execution, batch)
        timed = _measure(whole | branches, rounds, steps, advance)
        page_faults = _page_faults(whole["step"], rounds * steps)
    median = {name: float(np.median(seconds)) for name, seconds in timed.items()}
    spread = Spread.of(timed["step"])
    rows, inputs, targets = setup.row_slots
    return Parts(
        parameters=run.model.param_count(),
        step_seconds=spread,
        page_faults=page_faults,
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


def _whole_programs(setup: Setup, programs: Programs, step: Callable[..., Any], batch: Batch) -> dict[str, Program]:
    """Programs for the whole step, its forward pass and its optimizer, each on a state of its own."""
    execution, z_loss = setup.train.execution, setup.model.recipe.z_loss

    @jax.jit
    def forward(params: Any, batch: Batch) -> jax.Array:
        return weighted_loss(programs.model, params, batch, execution, z_loss, None)[0]

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, grads: Any) -> TrainState:
        updates, opt_state = programs.optimizer.update(grads, state.opt_state, state.params)
        return TrainState(step=state.step, params=optax.apply_updates(state.params, updates), opt_state=opt_state)

    states = {
        name: init_state(programs.model, programs.optimizer, setup.train.seed, programs.shardings)
        for name in ("step", "optimizer")
    }
    rate = np.float32(setup.learning_rate)
    numbers = programs.replicate(Numbers(seed=np.uint32(setup.train.seed), learning_rate=rate))
    grads = jax.tree.map(jnp.ones_like, states["optimizer"].params)

    def train_step() -> Any:
        states["step"], metrics = step(states["step"], batch, numbers)
        return metrics

    def update_step() -> Any:
        states["optimizer"] = update(states["optimizer"], grads)
        return states["optimizer"]

    return {
        "step": train_step,
        "forward": lambda: forward(states["step"].params, batch),
        "optimizer": update_step,
    }


def _measure(
    programs: dict[str, Program], rounds: int, steps: int, advance: Callable[[int], None]
) -> dict[str, list[float]]:
    """Seconds per call in each round; every program is compiled and run once before the first round."""
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


def _page_faults(run: Program, calls: int) -> float:
    """Page faults per call that needed no disk, of all threads."""
    jax.block_until_ready(run())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        jax.block_until_ready(run())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls


Slots = tuple[jax.Array, jax.Array]
"""Segments and positions."""


def _branches(config: ModelConfig, execution: Execution, batch: Batch) -> dict[str, Program]:
    """Forward and backward programs for the branches of all layers, by kind, each with its norm and residual."""
    inputs = jnp.asarray(batch.input_segments_BI), jnp.asarray(batch.input_positions_BI)
    targets = jnp.asarray(batch.target_segments_BT), jnp.asarray(batch.target_positions_BT)
    both = (jnp.concatenate([inputs[0], targets[0]], axis=1), jnp.concatenate([inputs[1], targets[1]], axis=1))
    attention, mlp = partial(_attention, config, execution), partial(_mlp, config, execution)
    family = family_of(config)
    layers = [stack.layers for stack in family.stacks(config, inputs[0].shape[1], targets[0].shape[1])]
    if family.encodes_inputs:
        encoder, decoder = layers
        branches = {
            "encoder attention": attention(encoder, inputs, causal=False),
            "encoder MLP": mlp(encoder, inputs),
            "decoder attention": attention(decoder, targets, causal=True),
            "cross-attention": attention(decoder, targets, causal=False, memory=inputs),
            "decoder MLP": mlp(decoder, targets),
        }
    else:
        branches = {"attention": attention(layers[0], both, causal=True), "MLP": mlp(layers[0], both)}
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
    return Initialisers(c.recipe, Scaling.of(c, layers), branches=1)


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
    """One program of `layers` times `x + apply(block, norm(x), memory)`, and its gradients.

    The layers share weights, which costs as much as weights of their own. The gradient of the output is arbitrary.
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
