"""The protocol through which the loop, decoding and the ledgers meet a model family."""

from typing import Any, Protocol

import jax

from common.data.batch import Batch, Prompt
from common.recipe import Execution


class Model(Protocol):
    """An NNX module. Legend: B batch rows, T target slots, Q new tokens, D model, V vocab."""

    execution: Execution

    def hidden(self, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """h_BTD on the target slots; without a key dropout is off."""
        ...

    def head(self) -> jax.Array:
        """w_DV in float32: logits are `hidden @ w_DV`, taken in chunks."""
        ...

    def prefill(self, prompt: Prompt, max_new_tokens: int) -> Any:
        """A cache that has read the inputs and has room for `max_new_tokens` decoder inputs.

        A pytree that decoding gives more room (`extend`), and whose rows beam search repeats and takes (`repeat_rows`,
        `take_rows`: see `common.nn.cache`).
        """
        ...

    def decode(self, tokens_BQ: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """h_BQD after each of the decoder inputs `tokens_BQ`, and the advanced cache."""
        ...
