"""The encoder-decoder transformer: a bidirectional stack over inputs, and a causal one over targets that reads it.

Legend: B batch rows, I input slots, T target slots, S decoder cache slots, D model, V vocab, N layers.
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
from t5like.config import T5LikeConfig


def _attention(config: T5LikeConfig, execution: Execution, init: Initialisers, rngs: nnx.Rngs) -> Attention:
    c = config
    return Attention(c.d_model, c.num_heads, c.num_kv_heads, c.head_dim, c.recipe, execution, init, rngs=rngs)


class EncoderLayer(nnx.Module):
    """Pre-norm residual layer: bidirectional self-attention, then MLP."""

    def __init__(self, config: T5LikeConfig, execution: Execution, init: Initialisers, *, rngs: nnx.Rngs):
        self.dropout_rate = config.recipe.dropout
        self.attention_norm = RMSNorm(config.d_model, config.recipe.norm_epsilon, rngs=rngs)
        self.attention = _attention(config, execution, init, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.recipe.norm_epsilon, rngs=rngs)
        self.mlp = MLP(config.d_model, config.d_ff, config.recipe, init, rngs=rngs)

    def __call__(self, x_BID: jax.Array, visibility: Visibility, key: jax.Array | None) -> jax.Array:
        weights_key, attention_key, hidden_key, mlp_key = dropout_keys(key, 4)
        h_BID = self.attention_norm(x_BID)
        memory = self.attention.keys_values(h_BID, visibility.k_positions_BK)
        h_BID = self.attention(h_BID, memory, visibility, weights_key)
        x_BID = x_BID + dropout(h_BID, self.dropout_rate, attention_key)
        h_BID = self.mlp(self.mlp_norm(x_BID), hidden_key)
        return x_BID + dropout(h_BID, self.dropout_rate, mlp_key)


class DecoderLayer(nnx.Module):
    """Pre-norm residual layer: causal self-attention, cross-attention to the encoder's output, then MLP."""

    def __init__(self, config: T5LikeConfig, execution: Execution, init: Initialisers, *, rngs: nnx.Rngs):
        self.dropout_rate = config.recipe.dropout
        self.attention_norm = RMSNorm(config.d_model, config.recipe.norm_epsilon, rngs=rngs)
        self.attention = _attention(config, execution, init, rngs)
        self.cross_norm = RMSNorm(config.d_model, config.recipe.norm_epsilon, rngs=rngs)
        self.cross_attention = _attention(config, execution, init, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.recipe.norm_epsilon, rngs=rngs)
        self.mlp = MLP(config.d_model, config.d_ff, config.recipe, init, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        encoded: KeysValues,
        self_visibility: Visibility,
        cross_visibility: Visibility,
        key: jax.Array | None = None,
        cache: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """The next stream, and the decoder's own keys and values (the updated cache, where one is given)."""
        weights_key, attention_key, cross_weights_key, cross_key, hidden_key, mlp_key = dropout_keys(key, 6)
        h_BTD = self.attention_norm(x_BTD)
        memory = self.attention.keys_values(h_BTD, self_visibility.q_positions_BQ)
        if cache is not None:
            memory = cache.insert(memory, self_visibility.q_start)
        h_BTD = self.attention(h_BTD, memory, self_visibility, weights_key)
        x_BTD = x_BTD + dropout(h_BTD, self.dropout_rate, attention_key)
        h_BTD = self.cross_attention(self.cross_norm(x_BTD), encoded, cross_visibility, cross_weights_key)
        x_BTD = x_BTD + dropout(h_BTD, self.dropout_rate, cross_key)
        h_BTD = self.mlp(self.mlp_norm(x_BTD), hidden_key)
        return x_BTD + dropout(h_BTD, self.dropout_rate, mlp_key), memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    """Per layer `[N, B, ...]`: the encoder's keys and values, computed once, and the decoder's, one slot a token."""

    encoded: KeysValues
    layers: KeysValues
    input_segments_BI: jax.Array
    input_positions_BI: jax.Array
    positions_BS: jax.Array
    length: jax.Array
    """Filled decoder slots (scalar); the next token goes there."""
    next_position_B: jax.Array


class T5Like(nnx.Module):
    def __init__(self, config: T5LikeConfig, execution: Execution, *, rngs: nnx.Rngs):
        self.config, self.execution = config, execution
        recipe = config.recipe
        encoder_init = Initialisers(recipe, residual_branches=2 * config.encoder_layers)
        decoder_init = Initialisers(recipe, residual_branches=3 * config.decoder_layers)
        self.embedding = Embedding(config.vocab_size, config.d_model, encoder_init, rngs=rngs)
        self.encoder_bias = relative_bias(config.num_heads, True, recipe, encoder_init, rngs)
        self.decoder_bias = relative_bias(config.num_heads, False, recipe, decoder_init, rngs)
        self.encoder = stack(
            config.encoder_layers, lambda rngs: EncoderLayer(config, execution, encoder_init, rngs=rngs), rngs
        )
        self.encoder_norm = RMSNorm(config.d_model, recipe.norm_epsilon, rngs=rngs)
        self.decoder = stack(
            config.decoder_layers, lambda rngs: DecoderLayer(config, execution, decoder_init, rngs=rngs), rngs
        )
        self.decoder_norm = RMSNorm(config.d_model, recipe.norm_epsilon, rngs=rngs)
        self.output = Head(config.vocab_size, config.d_model, recipe, decoder_init, rngs=rngs)

    def hidden(self, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """h_BTD on the target slots, in the activation dtype."""
        rate = self.config.recipe.dropout
        encoder_key, embed_key, layers_key, final_key = dropout_keys(dropout_key, 4)
        encoded_BID = self._encode(batch.inputs_BI, batch.input_segments_BI, batch.input_positions_BI, encoder_key)
        self_visibility = Visibility(
            q_segments_BQ=batch.target_segments_BT,
            k_segments_BK=batch.target_segments_BT,
            q_positions_BQ=batch.target_positions_BT,
            k_positions_BK=batch.target_positions_BT,
            causal=True,
            bias=bias_table(self.decoder_bias),
        )
        # Cross-attention has no relative bias; RoPE goes on counting from the inputs.
        cross_visibility = Visibility(
            q_segments_BQ=batch.target_segments_BT,
            k_segments_BK=batch.input_segments_BI,
            q_positions_BQ=batch.target_positions_BT,
            k_positions_BK=batch.input_positions_BI,
            causal=False,
        )

        def layer(layer: DecoderLayer, x_BTD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            encoded = layer.cross_attention.keys_values(encoded_BID, batch.input_positions_BI)
            return layer(x_BTD, encoded, self_visibility, cross_visibility, key)[0], None

        x_BTD = dropout(self.embedding(batch.decoder_inputs_BT, encoded_BID.dtype), rate, embed_key)
        keys_N = None if layers_key is None else jax.random.split(layers_key, self.config.decoder_layers)
        x_BTD, _ = run_layers(self.decoder, layer, x_BTD, keys_N, self.execution)
        return dropout(self.decoder_norm(x_BTD), rate, final_key)

    def head(self) -> jax.Array:
        """w_DV (float32): logits are `hidden @ w_DV`."""
        return self.output.weights(self.embedding)

    def prefill(self, prompt: Prompt, max_new_tokens: int) -> Cache:
        """Encodes the inputs once, and projects them once for every decoder layer."""
        segments_BI, positions_BI = prompt.segments_BI(), prompt.positions_BI()
        encoded_BID = self._encode(prompt.inputs_BI, segments_BI, positions_BI, None)

        def project(layer: DecoderLayer, _: None, __: None) -> tuple[None, KeysValues]:
            return None, layer.cross_attention.keys_values(encoded_BID, positions_BI)

        _, encoded_N = run_layers(self.decoder, project, None, None, self.execution)
        room = (self.config.decoder_layers, encoded_BID.shape[0], max_new_tokens, *encoded_N.k_BKGC.shape[3:])
        return Cache(
            encoded=encoded_N,
            layers=KeysValues(jnp.zeros(room, encoded_BID.dtype), jnp.zeros(room, encoded_BID.dtype)),
            input_segments_BI=segments_BI,
            input_positions_BI=positions_BI,
            positions_BS=jnp.zeros((encoded_BID.shape[0], max_new_tokens), jnp.int32),
            length=jnp.int32(0),
            next_position_B=prompt.lengths_B,
        )

    def decode(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """h_BD for the decoder inputs `tokens_B`, and the cache with them in it."""
        position_B1 = cache.next_position_B[:, None]
        positions_BS = jax.lax.dynamic_update_slice_in_dim(cache.positions_BS, position_B1, cache.length, axis=1)
        self_visibility = Visibility(
            q_segments_BQ=jnp.ones_like(position_B1),
            k_segments_BK=jnp.ones_like(positions_BS),
            q_positions_BQ=position_B1,
            k_positions_BK=positions_BS,
            causal=True,
            q_start=cache.length,
            bias=bias_table(self.decoder_bias),
        )
        cross_visibility = Visibility(
            q_segments_BQ=jnp.ones_like(position_B1),
            k_segments_BK=cache.input_segments_BI,
            q_positions_BQ=position_B1,
            k_positions_BK=cache.input_positions_BI,
            causal=False,
        )

        def layer(
            layer: DecoderLayer, x_B1D: jax.Array, caches: tuple[KeysValues, KeysValues]
        ) -> tuple[jax.Array, KeysValues]:
            encoded, cached = caches
            return layer(x_B1D, encoded, self_visibility, cross_visibility, cache=cached)

        x_B1D = self.embedding(tokens_B[:, None], jnp.dtype(self.execution.dtype))
        x_B1D, layers = run_layers(self.decoder, layer, x_B1D, (cache.encoded, cache.layers), self.execution)
        advanced = dataclasses.replace(
            cache,
            layers=layers,
            positions_BS=positions_BS,
            length=cache.length + 1,
            next_position_B=cache.next_position_B + 1,
        )
        return self.decoder_norm(x_B1D)[:, 0], advanced

    def _encode(
        self, inputs_BI: jax.Array, segments_BI: jax.Array, positions_BI: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        rate = self.config.recipe.dropout
        embed_key, layers_key, final_key = dropout_keys(key, 3)
        visibility = Visibility(
            q_segments_BQ=segments_BI,
            k_segments_BK=segments_BI,
            q_positions_BQ=positions_BI,
            k_positions_BK=positions_BI,
            causal=False,
            bias=bias_table(self.encoder_bias),
        )

        def layer(layer: EncoderLayer, x_BID: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            return layer(x_BID, visibility, key), None

        x_BID = dropout(self.embedding(inputs_BI, jnp.dtype(self.execution.dtype)), rate, embed_key)
        keys_N = None if layers_key is None else jax.random.split(layers_key, self.config.encoder_layers)
        x_BID, _ = run_layers(self.encoder, layer, x_BID, keys_N, self.execution)
        return dropout(self.encoder_norm(x_BID), rate, final_key)
