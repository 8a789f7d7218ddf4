"""What the loop, decoding and scoring know of a model: the module's protocol, and a model without its parameters.

Legend: B batch rows, T target slots, Q new tokens, D model, V vocab.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
from flax import nnx

from common.data.batch import Batch, Prompt
from common.nn.linear import split_columns
from common.nn.stack import per_layer
from common.recipe import Execution
from common.trees import flatten


class Model(Protocol):
    """An NNX module of either family."""

    execution: Execution

    def hidden(self, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """Returns h_BTD on the target slots; without a key, dropout is off."""
        ...

    def head(self) -> jax.Array:
        """Returns w_DV in float32: logits are `hidden @ w_DV`, computed in chunks."""
        ...

    def prefill(self, prompt: Prompt, max_new_tokens: int) -> Any:
        """Returns a cache that has read the inputs and has room for `max_new_tokens` decoder inputs.

        The cache is a pytree. Decoding enlarges it (`extend`); beam search repeats and gathers its rows
        (`repeat_rows`, `take_rows`: see `common.nn.cache`).
        """
        ...

    def decode(self, tokens_BQ: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Returns h_BQD after each of the decoder inputs `tokens_BQ`, and the advanced cache."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Skeleton:
    """A model without its parameters; equal only to itself, so it can key a cache of compiled programs."""

    graphdef: Any
    logical_axes: Any
    """Tree like `params`, of tuples of logical axis names."""
    shapes: Any
    """Tree like `params`, of `jax.ShapeDtypeStruct`."""
    build: Callable[[nnx.Rngs], Model]

    @functools.cached_property
    def max_positions(self) -> int | None:
        """Most positions in a text, the rows of a learned table; None if the model has no such table."""
        shapes, all_axes = flatten(self.shapes), flatten(self.logical_axes).items()
        sizes = [shapes[name].shape[axes.index("positions")] for name, axes in all_axes if "positions" in axes]
        return min(sizes, default=None)

    def merge(self, params: Any) -> Model:
        """Returns the model with `params`, nested dicts of arrays."""
        return nnx.merge(self.graphdef, params)

    def for_decoding(self, params: Any) -> Any:
        """Returns the same parameters in the fastest form for many small steps: unrolled layers as separate arrays."""
        if self.merge(params).execution.scan_layers:
            return params
        return self._unrolled(params)

    @functools.cached_property
    def _unrolled(self) -> Callable[[Any], Any]:
        form = split_columns if jax.default_backend() == "cpu" else lambda x, axes: x
        return jax.jit(lambda params: per_layer(params, self.logical_axes, form))


def skeleton(build: Callable[[nnx.Rngs], Model]) -> Skeleton:
    """Traces `build` without allocating arrays."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    axes = {path: variable.get_metadata("out_sharding") for path, variable in nnx.to_flat_state(state)}
    return Skeleton(
        graphdef=graphdef,
        logical_axes=nnx.traversals.unflatten_mapping(axes),
        shapes=nnx.to_pure_dict(state),
        build=build,
    )
