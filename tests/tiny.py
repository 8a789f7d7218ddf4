"""Tiny runs for tests of training: models of one layer, in-memory examples, and a watcher that can stop a run."""

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from common.config import to_json
from common.data.examples import RecordExamples
from common.data.loader import Loader
from common.data.objectives.config import Supervised
from common.data.packing import RowPlans
from common.data.tokenized.token_store import TokenStream
from common.recipe import Recipe
from common.sharding.shape import MeshShape
from common.train.config import AdamW, Budget, Cosine, TrainConfig
from common.train.programs import Setup
from common.train.step import Guard, Numbers
from common.train.task import Stream, Task
from experiments.families import ModelConfig, builder
from gpt.config import GptConfig
from t5like.config import T5LikeConfig
from tests.helpers import F32, VOCAB

ROWS, INPUTS, TARGETS = 8, 12, 10
SIZES = {"vocab_size": VOCAB, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "d_ff": 32}
RECIPE = Recipe(positions="rope", mlp="relu")
EXECUTION = dataclasses.replace(F32, loss_chunk=64)


@contextlib.contextmanager
def jax_settings(settings: dict[str, Any]) -> Iterator[None]:
    """Sets options of JAX inside the block, including those of its compilation cache."""
    before = {name: jax.config.values[name] for name in settings}
    try:
        _set_jax_options(settings)
        yield
    finally:
        _set_jax_options(before)


def _set_jax_options(values: dict[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def tiny(family: str, recipe: Recipe = RECIPE) -> ModelConfig:
    if family == "gpt":
        return GptConfig(num_layers=1, recipe=recipe, **SIZES)
    return T5LikeConfig(encoder_layers=1, decoder_layers=1, recipe=recipe, **SIZES)


def train_config(**change: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "budget": Budget(unit="steps", amount=8),
        "optimizer": AdamW(),
        "schedule": Cosine(warmup_steps=2),
        "validate_every": 4,
        "checkpoint_every": 3,
        "mesh": MeshShape(),
        "execution": EXECUTION,
    }
    return TrainConfig(**{**values, **change})


def setup(model: ModelConfig, train: TrainConfig, learning_rate: float = 1e-2) -> Setup:
    return Setup(
        build=builder(model, train.execution),
        model=model,
        train=train,
        learning_rate=learning_rate,
        steps=train.budget.steps(ROWS * (INPUTS + TARGETS), 1),
        row_slots=(ROWS, INPUTS, TARGETS),
    )


def numbers(learning_rate: float, *, seed: int = 0, guard: Guard | None = None) -> Numbers:
    """Returns what a step takes besides state and batch."""
    return Numbers(seed=np.uint32(seed), learning_rate=np.float32(learning_rate), guard=guard)


DATA = {"content_id": "source", "tokenizer_hash": "tokenizer"}


def loader(
    *,
    text_seed: int = 0,
    order: int = 0,
    content_id: str = DATA["content_id"],
    tokenizer_hash: str = DATA["tokenizer_hash"],
) -> Loader:
    """Makes a loader of random texts of at most 5 tokens, in memory."""
    rng = np.random.default_rng(text_seed)

    def texts() -> TokenStream:
        return TokenStream.of(rng.integers(3, VOCAB, rng.integers(0, 6)).tolist() for _ in range(200))

    made = RecordExamples(
        {"inputs": texts(), "targets": texts()},
        objective=Supervised(),
        seed=0,
        tokenizer=types.SimpleNamespace(eos_id=1, pad_id=0, start_id=0, content_hash=tokenizer_hash),
        source_content_id=content_id,
    )
    plans = RowPlans(made, input_limit=INPUTS, target_limit=TARGETS, seed=order, cache_dir=None)
    return Loader(made, plans, rows=ROWS)


def task(family: str, stream: Stream | None = None, data: dict[str, str] | None = None, **train: Any) -> Task:
    config = train_config(**train)
    model = tiny(family)
    return Task(
        setup=setup(model, config),
        stream=stream or loader(),
        validation=tuple(loader(text_seed=1).validation_batches(2)),
        config={"model": to_json(model), "train": to_json(config)},
        data=data or DATA,
    )


class Stopped(Exception):
    """Raised by an Observer to interrupt a run."""


@dataclasses.dataclass
class Observer:
    """A watcher that records notes and steps, and raises Stopped after step `stop_at`."""

    stop_at: int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    steps: list[int] = dataclasses.field(default_factory=list)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def begin(self, step: int, steps: int) -> None:
        pass

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        self.steps.append(row["step"])
        if row["step"] == self.stop_at:
            raise Stopped
