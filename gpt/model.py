"""The decoder-only transformer: one causal stack over `[inputs | shifted targets]`.

Legend: B batch rows, I input slots, T target slots, L = I + T, S cache slots, D model, V vocab, N layers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from common.data.batch import Batch
from common.infer.prompt import Prompt
from common.kernels.visibility import Visibility
from common.nn.attention import Attention, KeysValues
from common.nn.layers import MLP, Embedding, Head, RMSNorm, dropout, dropout_keys
from common.nn.parameters import Initialisers
from common.nn.positions import bias_table, relative_bias
from common.nn.recipe import Execution
from common.nn.stack import run_layers, stack
from gpt.config import GptConfig


class Layer(nnx.Module):
    """Pre-norm residual layer: self-attention, then MLP."""

    def __init__(self, config: GptConfig, execution: Execution, init: Initialisers, *, rngs: nnx.Rngs):
        c = config
        self.dropout_rate = c.recipe.dropout
        self.attention_norm = RMSNorm(c.d_model, c.recipe.norm_epsilon, rngs=rngs)
        self.attention = Attention(
            c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.recipe, execution, init, rngs=rngs
        )
        self.mlp_norm = RMSNorm(c.d_model, c.recipe.norm_epsilon, rngs=rngs)
        self.mlp = MLP(c.d_model, c.d_ff, c.recipe, init, rngs=rngs)

    def __call__(
        self,
        x_BLD: jax.Array,
        visibility: Visibility,
        key: jax.Array | None = None,
        cache: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """The next stream, and the keys and values attended to (the updated cache, where one is given)."""
        weights_key, attention_key, hidden_key, mlp_key = dropout_keys(key, 4)
        h_BLD = self.attention_norm(x_BLD)
        memory = self.attention.keys_values(h_BLD, visibility.q_positions_BQ)
        if cache is not None:
            memory = cache.insert(memory, visibility.q_start)
        h_BLD = self.attention(h_BLD, memory, visibility, weights_key)
        x_BLD = x_BLD + dropout(h_BLD, self.dropout_rate, attention_key)
        h_BLD = self.mlp(self.mlp_norm(x_BLD), hidden_key)
        return x_BLD + dropout(h_BLD, self.dropout_rate, mlp_key), memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of all layers, `[N, B, S, ...]`, with what later queries need to know of those slots."""

    layers: KeysValues
    segments_BS: jax.Array
    positions_BS: jax.Array
    length: jax.Array
    """Filled slots (scalar); the next token goes there."""
    next_position_B: jax.Array


class Gpt(nnx.Module):
    def __init__(self, config: GptConfig, execution: Execution, *, rngs: nnx.Rngs):
        self.config, self.execution = config, execution
        init = Initialisers(config.recipe, residual_branches=2 * config.num_layers)
        self.embedding = Embedding(config.vocab_size, config.d_model, init, rngs=rngs)
        self.relative_bias = relative_bias(
            config.num_heads, config.input_attention == "bidirectional", config.recipe, init, rngs
        )
        self.layers = stack(config.num_layers, lambda rngs: Layer(config, execution, init, rngs=rngs), rngs)
        self.final_norm = RMSNorm(config.d_model, config.recipe.norm_epsilon, rngs=rngs)
        self.output = Head(config.vocab_size, config.d_model, config.recipe, init, rngs=rngs)

    def hidden(self, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """h_BTD on the target slots, in the activation dtype."""
        segments_BL = jnp.concatenate([batch.input_segments_BI, batch.target_segments_BT], axis=1)
        positions_BL = jnp.concatenate([batch.input_positions_BI, batch.target_positions_BT], axis=1)
        tokens_BL = jnp.concatenate([batch.inputs_BI, batch.decoder_inputs_BT], axis=1)
        input_slots = batch.inputs_BI.shape[1]
        visibility = self._visibility(segments_BL, positions_BL, prefix_length=input_slots)
        embed_key, layers_key, final_key = dropout_keys(dropout_key, 3)
        rate = self.config.recipe.dropout
        x_BLD = dropout(self.embedding(tokens_BL, jnp.dtype(self.execution.dtype)), rate, embed_key)
        keys_N = None if layers_key is None else jax.random.split(layers_key, self.config.num_layers)

        def layer(layer: Layer, x_BLD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            return layer(x_BLD, visibility, key)[0], None

        x_BLD, _ = run_layers(self.layers, layer, x_BLD, keys_N, self.execution)
        return dropout(self.final_norm(x_BLD[:, input_slots:]), rate, final_key)

    def head(self) -> jax.Array:
        """w_DV (float32): logits are `hidden @ w_DV`."""
        return self.output.weights(self.embedding)

    def prefill(self, prompt: Prompt, max_new_tokens: int) -> Cache:
        """Reads the inputs once; the cache has room for `max_new_tokens` decoder inputs behind them."""
        segments_BI, positions_BI = prompt.segments_BI(), prompt.positions_BI()
        visibility = self._visibility(segments_BI, positions_BI, prefix_length=positions_BI.shape[1])

        def layer(layer: Layer, x_BID: jax.Array, _: None) -> tuple[jax.Array, KeysValues]:
            x_BID, memory = layer(x_BID, visibility)
            return x_BID, memory.extend(max_new_tokens)

        x_BID = self.embedding(prompt.inputs_BI, jnp.dtype(self.execution.dtype))
        _, memory_N = run_layers(self.layers, layer, x_BID, None, self.execution)
        room = ((0, 0), (0, max_new_tokens))
        return Cache(
            layers=memory_N,
            segments_BS=jnp.pad(segments_BI, room, constant_values=1),
            positions_BS=jnp.pad(positions_BI, room),
            length=jnp.int32(positions_BI.shape[1]),
            next_position_B=prompt.lengths_B,
        )

    def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """h_BD for the decoder inputs `tokens_B`, and the cache with them in it."""
        position_B1 = cache.next_position_B[:, None]
        positions_BS = jax.lax.dynamic_update_slice_in_dim(cache.positions_BS, position_B1, cache.length, axis=1)
        visibility = Visibility(
            q_segments_BQ=jnp.ones_like(position_B1),
            k_segments_BK=cache.segments_BS,
            q_positions_BQ=position_B1,
            k_positions_BK=positions_BS,
            causal=True,
            q_start=cache.length,
            bias=bias_table(self.relative_bias),
        )

        def layer(layer: Layer, x_B1D: jax.Array, cached: KeysValues) -> tuple[jax.Array, KeysValues]:
            return layer(x_B1D, visibility, cache=cached)

        x_B1D = self.embedding(tokens_B[:, None], jnp.dtype(self.execution.dtype))
        x_B1D, layers = run_layers(self.layers, layer, x_B1D, cache.layers, self.execution)
        advanced = dataclasses.replace(
            cache,
            layers=layers,
            positions_BS=positions_BS,
            length=cache.length + 1,
            next_position_B=cache.next_position_B + 1,
        )
        return self.final_norm(x_B1D)[:, 0], advanced

    def _visibility(self, segments_BL: jax.Array, positions_BL: jax.Array, prefix_length: int) -> Visibility:
        return Visibility(
            q_segments_BQ=segments_BL,
            k_segments_BK=segments_BL,
            q_positions_BQ=positions_BL,
            k_positions_BK=positions_BL,
            causal=True,
            prefix_length=prefix_length if self.config.input_attention == "bidirectional" else 0,
            bias=bias_table(self.relative_bias),
        )
