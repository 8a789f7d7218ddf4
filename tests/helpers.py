"""Small models of both families and hand-made rows, for tests."""

import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.data.batch import Batch
from common.data.block_layout import build_batch
from common.data.examples import RecordExamples
from common.data.objectives.config import Supervised
from common.data.tokenized.token_store import TokenStream
from common.model import skeleton
from common.recipe import GPT2, T5_V1_0, T5_V1_1, CompleteP, Execution, Recipe
from common.sharding.shape import MeshShape
from experiments.families import ModelConfig, builder
from gpt.config import GptConfig
from t5like.config import RUNGS, T5LikeConfig

VOCAB = 128
WIDTHS = {"vocab_size": VOCAB, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 48}
ONE_DEVICE = MeshShape()
EIGHT_DEVICES = MeshShape(data=2, fsdp=2, tensor=2)
F32 = Execution(dtype="float32", matmul_precision="highest", scan_layers=False, attention_block=8, loss_chunk=32)

ROPE = Recipe(positions="rope")
BIAS = T5_V1_1
LEARNED = dataclasses.replace(GPT2, tied_embeddings=False)
GEMMA = Recipe(mlp="geglu", tied_embeddings=True, scale_embeddings=True, qk_norm=True)
"""Options that no preset has: head norms and scaled embeddings."""
COMPLETEP = Recipe(parametrization=CompleteP(base_width=8, base_layers=4, base_head_dim=4))
"""Sizes other than its base's, so that no multiplier is 1."""
MAX_POSITIONS = 48

Pair = tuple[list[int], list[int]]

# Packed neighbours, an empty input, an empty target, token id 0 inside texts.
PAIRS: list[Pair] = [([5, 6, 0, 7, 1], [8, 0, 9, 1]), ([], [3, 4, 1]), ([2, 0, 1], []), ([11, 12, 1], [13, 1])]


def gpt(recipe: Recipe = ROPE, **change: Any) -> GptConfig:
    positions = _max_positions(recipe)
    return GptConfig(**{"num_layers": 2, "recipe": recipe, "max_positions": positions, **WIDTHS, **change})


def t5like(recipe: Recipe = ROPE, **change: Any) -> T5LikeConfig:
    layers = {"encoder_layers": 1, "decoder_layers": 2}
    positions = _max_positions(recipe)
    return T5LikeConfig(**{**layers, "recipe": recipe, "max_positions": positions, **WIDTHS, **change})


def _max_positions(recipe: Recipe) -> int | None:
    return MAX_POSITIONS if recipe.positions == "learned" else None


FAMILIES: dict[str, ModelConfig] = {
    "gpt-rope": gpt(ROPE),
    "gpt-bias": gpt(BIAS),
    "gpt-prefix": gpt(ROPE, input_attention="bidirectional"),
    "gpt-tied": gpt(dataclasses.replace(ROPE, tied_embeddings=True, mlp="gelu")),
    "gpt-learned": gpt(LEARNED),
    "gpt-gemma": gpt(GEMMA),
    "gpt-completep": gpt(COMPLETEP),
    "t5like-rope": t5like(ROPE),
    "t5like-bias": t5like(BIAS),
    "t5like-tied": t5like(T5_V1_0),
    "t5like-learned": t5like(LEARNED),
    "t5like-completep": t5like(COMPLETEP),
    "t5like-relaxed": t5like(GEMMA, encoder_layers=2, **RUNGS[4]),
}


REPRESENTATIVE = ("gpt-learned", "t5like-bias", "t5like-relaxed")
"""Between them every position scheme, norm, MLP and head layout; `make test-slow` runs the others as well."""


def representative(*values: Any, name: str, id: str | None = None) -> Any:
    """Parameters of a test of the model `name`: slow unless it is a representative one."""
    return pytest.param(*values, id=id, marks=[] if name in REPRESENTATIVE else pytest.mark.slow)


families = pytest.mark.parametrize(
    "config", [representative(config, name=name, id=name) for name, config in FAMILIES.items()]
)


@functools.cache
def graph(config: ModelConfig, execution: Execution = F32) -> Any:
    """The model's graphdef; equal arguments return the same object."""
    build = builder(config, execution)
    return nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[0]


@functools.cache
def split(config: ModelConfig, execution: Execution = F32) -> tuple[Any, Any]:
    """(graphdef, random parameters as a nested dict of arrays); equal arguments return the same objects."""
    return graph(config, execution), jax.tree.map(jnp.asarray, random_params(config))


@functools.cache
def fresh(config: ModelConfig) -> tuple[Any, Any]:
    """(graphdef, parameters from the model's own initialisers); compiling these takes seconds."""
    build = builder(config, F32)
    return graph(config), jax.jit(lambda: nnx.to_pure_dict(nnx.state(build(nnx.Rngs(0)))))()


def random_params(config: ModelConfig) -> Any:
    """Draws parameters by NumPy, in milliseconds: no scale is 1, no bias 0, and matrices keep variances in bounds."""
    rng = np.random.default_rng(0)

    def draw(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        values = rng.standard_normal(shape.shape, np.float32)
        if name.startswith("scale"):
            return 1 + np.float32(0.1) * values
        if "bias" in name or name.startswith("table"):
            return np.float32(0.3) * values
        return np.float32(0.3 / math.sqrt(config.d_model / 16)) * values

    return jax.tree_util.tree_map_with_path(draw, skeleton(builder(config, F32)).shapes)


def run(config: ModelConfig, method: Callable[..., Any], *args: Any) -> Any:
    """Returns `method(model, *args)`, jitted."""
    graphdef, params = split(config)
    return jax.jit(lambda params, args: method(nnx.merge(graphdef, params), *args))(params, args)


def logits(config: ModelConfig, batch: Batch) -> jax.Array:
    """logits_BTV, computed all at once; compiled once per config and shape of the batch."""
    return _logits_program(config)(split(config)[1], batch)


@functools.cache
def _logits_program(config: ModelConfig) -> Callable[[Any, Batch], jax.Array]:
    graphdef = graph(config)

    def whole(params: Any, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model.hidden(batch) @ model.head()

    return jax.jit(whole)


def rows_of(rows: Sequence[Sequence[Pair]], input_length: int = 16, target_length: int = 16) -> Batch:
    """A batch whose rows pack the given examples."""
    pairs = [pair for row in rows for pair in row]
    examples = RecordExamples(
        {"inputs": TokenStream.of(a for a, _ in pairs), "targets": TokenStream.of(b for _, b in pairs)},
        objective=Supervised(eos_after_inputs=False, eos_after_targets=False),
        seed=0,
        tokenizer=types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash="t"),
        source_content_id="tests",
    )
    starts = np.cumsum([0, *(len(row) for row in rows)])
    indices = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    batch = build_batch(examples, indices, input_length=input_length, target_length=target_length).batch
    return jax.tree.map(jnp.asarray, batch)


def random_rows(rows: int = 8, input_length: int = 16, target_length: int = 16, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)

    def text(most: int) -> list[int]:
        return rng.integers(0, VOCAB, rng.integers(0, most)).tolist()

    packed = [[(text(input_length // 3), text(target_length // 3)) for _ in range(3)] for _ in range(rows)]
    return rows_of(packed, input_length, target_length)


def close(a: Any, b: Any, relative: float) -> None:
    """Asserts leaf by leaf that the largest difference is at most `relative` times the largest value of `b`."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.isfinite(x).all()
        assert np.abs(x - y).max(initial=0) <= relative * max(np.abs(y).max(initial=0), 1e-30)
