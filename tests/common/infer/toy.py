"""A recurrent toy model with the decoding protocol: every token depends on all before it, and on the prompt.

Legend: B rows, Q new tokens, I input slots, D state, V vocab.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.data.batch import Prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyCache:
    state_BD: jax.Array
    memory_BD: jax.Array
    """The prompt's part; shared by all rows that `repeat_rows` makes of one row."""

    def extend(self, slots: int) -> "ToyCache":
        return self

    def repeat_rows(self, times: int) -> "ToyCache":
        return dataclasses.replace(self, state_BD=jnp.repeat(self.state_BD, times, axis=0))

    def take_rows(self, rows_B: jax.Array) -> "ToyCache":
        return dataclasses.replace(self, state_BD=self.state_BD[rows_B])


@dataclasses.dataclass(frozen=True, eq=False)
class Toy:
    """state' = tanh(state A + embedding[token] + memory); logits = state' head."""

    params: Any
    max_positions: int | None = None

    def merge(self, params: Any) -> "Toy":
        return Toy(params)

    def for_decoding(self, params: Any) -> Any:
        return params

    def head(self) -> jax.Array:
        return self.params["head"]

    def prefill(self, prompt: Prompt, max_new_tokens: int) -> ToyCache:
        embedded_BID = self.params["embedding"][prompt.inputs_BI] * prompt.segments_BI()[..., None].astype(jnp.float32)
        # Depends on the order of the inputs, as a model's memory does.
        weight_1I1 = 1.0 + jnp.arange(prompt.inputs_BI.shape[1], dtype=jnp.float32)[None, :, None]
        memory_BD = (embedded_BID / weight_1I1).sum(axis=1)
        return ToyCache(state_BD=jnp.zeros_like(memory_BD), memory_BD=memory_BD)

    def decode(self, tokens_BQ: jax.Array, cache: ToyCache) -> tuple[jax.Array, ToyCache]:
        assert tokens_BQ.shape[1] == 1
        memory_BD = jnp.repeat(cache.memory_BD, len(cache.state_BD) // len(cache.memory_BD), axis=0)
        state_BD = jnp.tanh(cache.state_BD @ self.params["mix"] + self.params["embedding"][tokens_BQ[:, 0]] + memory_BD)
        return state_BD[:, None], dataclasses.replace(cache, state_BD=state_BD)


def toy(vocab: int, width: int = 16, seed: int = 0, sharpness: float = 2.0) -> Toy:
    """Makes a random toy; `sharpness` scales its logits."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return Toy(
        {
            "embedding": normal(vocab, width),
            "mix": normal(width, width) / width**0.5,
            "head": sharpness * normal(width, vocab) / width**0.5,
        }
    )


def log_probs(model: Toy, inputs: list[int], start: int, tokens: list[int]) -> np.ndarray:
    """Returns log-probabilities of every next token, float64 [len(tokens) + 1, V], computed without a cache."""
    p = {name: np.asarray(x, np.float64) for name, x in model.params.items()}
    memory = sum((p["embedding"][x] / (1.0 + i) for i, x in enumerate(inputs)), np.zeros(p["mix"].shape[0]))
    state, rows = np.zeros_like(memory), []
    for token in [start, *tokens]:
        state = np.tanh(state @ p["mix"] + p["embedding"][token] + memory)
        logits = state @ p["head"]
        rows.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return np.array(rows)
