"""The decoder-only transformer: one stack of layers over `[inputs | shifted targets]`.

    tokens -> embedding -> N x (x + attention(norm(x)); x + MLP(norm(x))) -> final norm -> head

Legend: B batch rows, I input slots, T target slots, L = I + T, Q new tokens, S cache slots, D model, V vocab, N layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.data.batch import Batch, Prompt
from common.kernels.visibility import Visibility
from common.nn.attention import Attention, KeysValues
from common.nn.cache import Cache
from common.nn.layers import MLP, AddBranch, Embedding, Head, dropout, dropout_keys, make_norm
from common.nn.parameters import Initialisers
from common.nn.parametrization import Scaling
from common.nn.positions import bias_table, embed, learned_positions, relative_bias
from common.nn.stack import run_layers, stack
from common.recipe import Execution
from gpt.config import GptConfig


class Layer(nnx.Module):
    """Pre-norm residual layer: self-attention, then MLP."""

    def __init__(self, config: GptConfig, execution: Execution, init: Initialisers, *, rngs: nnx.Rngs):
        c = config
        self.add = AddBranch.of(c.recipe, init)
        self.attention_norm = make_norm(c.d_model, c.recipe, rngs)
        self.attention = Attention(c, execution, init, rngs=rngs)
        self.mlp_norm = make_norm(c.d_model, c.recipe, rngs)
        self.mlp = MLP(c, execution, init, rngs=rngs)

    def __call__(
        self,
        x_BLD: jax.Array,
        visibility: Visibility,
        key: jax.Array | None = None,
        cache: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """The residual stream after this layer, and the keys and values attended to (the updated cache, given one)."""
        weights_key, attention_key, hidden_key, mlp_key = dropout_keys(key, 4)
        h_BLD = self.attention_norm(x_BLD)
        keys_values = self.attention.keys_values(h_BLD, visibility.q_positions_BQ)
        if cache is not None:
            keys_values = cache.insert(keys_values, visibility.q_start)
        h_BLD = self.attention(h_BLD, keys_values, visibility, weights_key)
        x_BLD = self.add(x_BLD, h_BLD, attention_key)
        h_BLD = self.mlp(self.mlp_norm(x_BLD), hidden_key)
        return self.add(x_BLD, h_BLD, mlp_key), keys_values


class Gpt(nnx.Module):
    """A decoder-only model; a `common.model.Model`."""

    def __init__(self, config: GptConfig, execution: Execution, *, rngs: nnx.Rngs):
        self.config, self.execution = config, execution
        c, recipe = config, config.recipe
        init = Initialisers(recipe, Scaling.of(c, c.num_layers), branches=2)
        self.embedding = Embedding(c.vocab_size, c.d_model, recipe, init, rngs=rngs)
        self.positions = learned_positions(c.max_positions, c.d_model, init, rngs)
        self.relative_bias = relative_bias(c.num_heads, c.input_attention == "bidirectional", recipe, init, rngs)
        self.layers = stack(c.num_layers, lambda rngs: Layer(c, execution, init, rngs=rngs), rngs)
        self.final_norm = make_norm(c.d_model, recipe, rngs)
        self.output = Head(c.vocab_size, c.d_model, recipe, init, rngs=rngs)

    def hidden(self, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """h_BTD on the target slots, in the activation dtype."""
        segments_BL = jnp.concatenate([batch.input_segments_BI, batch.target_segments_BT], axis=1)
        positions_BL = jnp.concatenate([batch.input_positions_BI, batch.target_positions_BT], axis=1)
        tokens_BL = jnp.concatenate([batch.inputs_BI, batch.decoder_inputs_BT], axis=1)
        input_slots = batch.inputs_BI.shape[1]
        # Target positions continue from the example's own inputs, so they do not follow the order of slots.
        consecutive = input_slots == 0
        target_slots_BT = None
        if self.relative_bias is not None and self.config.input_attention == "causal" and not consecutive:
            # Kernels index the bias by distance in the row, so an example's targets must directly follow its inputs.
            order_BL, target_slots_BT = group_by_example(segments_BL, input_slots)
            segments_BL, positions_BL, tokens_BL = (
                jnp.take_along_axis(x_BL, order_BL, axis=1) for x_BL in (segments_BL, positions_BL, tokens_BL)
            )
            consecutive = True
        visibility = self._visibility(segments_BL, positions_BL, input_slots, consecutive=consecutive)
        embed_key, layers_key, final_key = dropout_keys(dropout_key, 3)
        rate = self.config.recipe.dropout
        x_BLD = dropout(self._embed(tokens_BL, positions_BL), rate, embed_key)
        keys_N = None if layers_key is None else jax.random.split(layers_key, self.config.num_layers)

        def apply(layer: Layer, x_BLD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            return layer(x_BLD, visibility, key)[0], None

        x_BLD, _ = run_layers(self.layers, apply, x_BLD, keys_N, self.execution)
        if target_slots_BT is None:
            x_BTD = x_BLD[:, input_slots:]
        else:
            x_BTD = jnp.take_along_axis(x_BLD, target_slots_BT[..., None], axis=1)
        return self.output(dropout(self.final_norm(x_BTD), rate, final_key))

    def head(self) -> jax.Array:
        """w_DV (float32): logits are `hidden @ w_DV`."""
        return self.output.weights(self.embedding)

    def prefill(self, prompt: Prompt, max_new_tokens: int) -> Cache:
        """Reads the inputs; the returned cache holds them and has room for `max_new_tokens` decoder inputs."""
        segments_BI, positions_BI = prompt.segments_BI(), prompt.positions_BI()
        visibility = self._visibility(segments_BI, positions_BI, positions_BI.shape[1], consecutive=True)
        visibility = dataclasses.replace(visibility, one_segment=True)

        def apply(layer: Layer, x_BID: jax.Array, _: None) -> tuple[jax.Array, KeysValues]:
            x_BID, keys_values = layer(x_BID, visibility)
            return x_BID, keys_values.extend(max_new_tokens)

        x_BID = self._embed(prompt.inputs_BI, positions_BI)
        _, layers_N = run_layers(self.layers, apply, x_BID, None, self.execution)
        return Cache.after_inputs(layers_N, prompt, max_new_tokens)

    def decode(self, tokens_BQ: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """h_BQD after the decoder inputs `tokens_BQ`, and the cache with them added."""
        cache, visibility = cache.advance(tokens_BQ.shape[1], bias_table(self.relative_bias))

        def apply(layer: Layer, x_BQD: jax.Array, cached: KeysValues) -> tuple[jax.Array, KeysValues]:
            return layer(x_BQD, visibility, cache=cached)

        x_BQD = self._embed(tokens_BQ, visibility.q_positions_BQ)
        x_BQD, layers_N = run_layers(self.layers, apply, x_BQD, cache.layers, self.execution)
        return self.output(self.final_norm(x_BQD)), dataclasses.replace(cache, layers=layers_N)

    def _embed(self, tokens_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
        return embed(self.embedding, self.positions, tokens_BL, positions_BL, jnp.dtype(self.execution.dtype))

    def _visibility(
        self, segments_BL: jax.Array, positions_BL: jax.Array, input_slots: int, *, consecutive: bool
    ) -> Visibility:
        return Visibility(
            q_segments_BQ=segments_BL,
            k_segments_BK=segments_BL,
            q_positions_BQ=positions_BL,
            k_positions_BK=positions_BL,
            causal=True,
            prefix_length=input_slots if self.config.input_attention == "bidirectional" else 0,
            bias=bias_table(self.relative_bias),
            consecutive=consecutive,
        )


def group_by_example(segments_BL: jax.Array, input_slots: int) -> tuple[jax.Array, jax.Array]:
    """Orders the slots of `[inputs | targets]` by example, so that an example's targets directly follow its inputs.

    Returns the order (padding last), and the new slots of the target slots; both int32.

    >>> order_BL, target_slots_BT = group_by_example(jnp.array([[1, 1, 2, 0, 1, 2, 2, 0]]), input_slots=4)
    >>> order_BL.tolist(), target_slots_BT.tolist()
    ([[0, 1, 4, 2, 5, 6, 3, 7]], [[2, 4, 5, 7]])
    """
    last = jnp.iinfo(segments_BL.dtype).max
    order_BL = jnp.argsort(jnp.where(segments_BL == 0, last, segments_BL), axis=1, stable=True)
    return order_BL, jnp.argsort(order_BL, axis=1)[:, input_slots:]
