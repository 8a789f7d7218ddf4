"""A cache may be kept only where reading on gives the same state as reading everything again."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.data.batch import Prompt
from common.model import skeleton
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from experiments.families import ModelConfig, builder
from experiments.run import MultiTurn
from experiments.running.multi_turn import measure
from t5like.config import RUNGS
from tests.helpers import BIAS, F32, ROPE, close, gpt, graph, random_params, split, t5like

CONFIGS: dict[str, ModelConfig] = {
    "gpt": gpt(ROPE),
    "gpt-bias": gpt(BIAS),
    "gpt-prefix": gpt(ROPE, input_attention="bidirectional"),
    **{f"rung{i}": t5like(ROPE, encoder_layers=2, **switches) for i, switches in enumerate(RUNGS)},
    "causal-alone": t5like(ROPE, encoder_layers=2, input_attention="causal"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_reads_incrementally_is_true_only_where_a_cache_stays_valid(config: ModelConfig) -> None:
    """Compares reading two texts one after the other with reading both at once."""
    tokens_BI = jnp.asarray(np.random.default_rng(0).integers(2, 100, (2, 12)), jnp.int32)

    def after(model: Any, tokens_BI: jax.Array, read: int) -> jax.Array:
        """Returns the last state if `read` tokens are inputs and the others are read with the cache."""
        lengths_B = jnp.full((2,), read, jnp.int32)
        prompt = Prompt(inputs_BI=tokens_BI[:, :read], lengths_B=lengths_B, starts_B=jnp.zeros_like(lengths_B))
        return model.decode(tokens_BI[:, read:], model.prefill(prompt, tokens_BI.shape[1] - read))[0][:, -1]

    graphdef, params = graph(config), random_params(config)
    both = jax.jit(lambda params, x: [after(nnx.merge(graphdef, params), x, read) for read in (11, 7)])
    at_once, in_turns = map(np.asarray, both(params, tokens_BI))
    if config.reads_incrementally:
        close(in_turns, at_once, 1e-5)
    else:
        assert np.abs(in_turns - at_once).max() > 1e-3 * np.abs(at_once).max()


@pytest.mark.parametrize("name", ["gpt", "rung0"])
def test_every_turn_is_timed(name: str) -> None:
    config = CONFIGS[name]
    model, (_, params) = skeleton(builder(config, F32)), split(config)
    mesh = make_mesh(MeshShape())
    done: list[int] = []
    plan = MultiTurn(turns=3, message_tokens=4, reply_tokens=2, repeats=2)
    costs = measure(config, model, params, mesh, plan, done.append)
    assert [cost.history_tokens for cost in costs] == [0, 6, 12] and done == [1, 1, 1]
    for cost, field in itertools.product(costs, ("read_again_seconds", "read_new_seconds")):
        seconds = dataclasses.asdict(cost)[field]
        assert (seconds is None) == (field == "read_new_seconds" and not config.reads_incrementally)
        assert seconds is None or seconds > 0
