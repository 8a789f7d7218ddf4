"""Measures what a conversation costs: before each answer a model reads everything again, or only the new tokens.

Legend: B rows, I input slots, Q new tokens.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common.data.batch import Prompt
from common.evals.measure import TurnCost
from common.model import Skeleton
from experiments.families import ModelConfig
from experiments.run import MultiTurn


def measure(
    config: ModelConfig, model: Skeleton, params: Any, mesh: Mesh, plan: MultiTurn, advance: Callable[[int], None]
) -> list[TurnCost]:
    """Times every turn of one conversation of random tokens; calls `advance(1)` after each.

    Replies have the planned length and are not timed. Programs are compiled before they are timed.
    """
    rng = np.random.default_rng(0)
    turn_tokens = plan.message_tokens + plan.reply_tokens
    tokens_BI = jnp.asarray(rng.integers(2, config.vocab_size, (1, plan.turns * turn_tokens)), jnp.int32)

    def read(params: Any, tokens_BI: jax.Array) -> Any:
        lengths_B = jnp.full((1,), tokens_BI.shape[1], jnp.int32)
        prompt = Prompt(inputs_BI=tokens_BI, lengths_B=lengths_B, starts_B=jnp.zeros_like(lengths_B))
        return model.merge(params).prefill(prompt, turn_tokens)

    def read_more(params: Any, tokens_BQ: jax.Array, cache: Any) -> Any:
        return model.merge(params).decode(tokens_BQ, cache)

    costs = []
    with jax.set_mesh(mesh):
        read, read_more = jax.jit(read), jax.jit(read_more)
        for turn in range(plan.turns):
            history = turn * turn_tokens
            end = history + plan.message_tokens
            again = _median_seconds(plan.repeats, read, params, tokens_BI[:, :end])
            new = None
            if config.reads_incrementally and not history:
                new = again
            elif config.reads_incrementally:
                # The cache holds the history with this turn's slots empty, as a server would keep it.
                cache = read(params, tokens_BI[:, :history])
                new = _median_seconds(plan.repeats, read_more, params, tokens_BI[:, history:end], cache)
            costs.append(
                TurnCost(turn=turn + 1, history_tokens=history, read_again_seconds=again, read_new_seconds=new)
            )
            advance(1)
    return costs


def _median_seconds(repeats: int, function: Callable[..., Any], *args: Any) -> float:
    """Times `function(*args)` after one untimed call, which compiles it."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
