"""The protocol through which the loop, decoding and the ledgers meet a model family."""

from typing import Any, Protocol

import jax

from common.compute.ledger import ForwardFlops
from common.compute.length_sums import LengthSums
from common.data.batch import Batch
from common.infer.prompt import Prompt
from common.recipe import Execution, Recipe


class ModelConfig(Protocol):
    """A frozen dataclass, validated when it is made."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def reads_incrementally(self) -> bool:
        """Whether what was read or written stays valid in a cache when more text follows."""
        ...

    def param_count(self) -> int:
        """Exact number of parameters."""
        ...

    def flops(self, text: LengthSums) -> ForwardFlops:
        """Exact matrix-product FLOPs of a forward pass over `text`."""
        ...


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
