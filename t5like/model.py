"""The encoder-decoder transformer: one stack over inputs, and a causal one over targets that reads it.

    inputs  -> embedding -> N x encoder layer -> norm -> memory
    targets -> embedding -> N x (self-attention, cross-attention to memory, MLP) -> norm -> head

Four switches of the config each remove one difference from a decoder-only model. In this module they decide where a
decoder layer finds its memory (`Layer.memory`, `T5Like._encode_layer`) and which keys its attention sees
(`T5Like._decoder_visibility`).

Legend: B batch rows, I input slots, T target slots, Q new tokens, D model, V vocab, N layers.
"""

import dataclasses
from typing import Any, NamedTuple

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
from t5like.config import T5LikeConfig


class DecoderVisibility(NamedTuple):
    """What a decoder layer's attentions may see."""

    own: Visibility
    """For self-attention; merged attention sees the memory in it too."""
    cross: Visibility | None
    """For separate cross-attention."""


class Layer(nnx.Module):
    """Pre-norm residual layer of either stack: self-attention, cross-attention if `crosses`, then MLP."""

    def __init__(
        self, config: T5LikeConfig, execution: Execution, init: Initialisers, *, crosses: bool, rngs: nnx.Rngs
    ):
        c = config
        self.add = AddBranch.of(c.recipe, init)
        self.final_memory = c.memory == "final"
        self.attention_norm = make_norm(c.d_model, c.recipe, rngs)
        self.attention = Attention(c, execution, init, rngs=rngs)
        self.cross_norm: Any = make_norm(c.d_model, c.recipe, rngs) if crosses else None
        self.cross_attention: Any = Attention(c, execution, init, rngs=rngs) if crosses else None
        self.mlp_norm = make_norm(c.d_model, c.recipe, rngs)
        self.mlp = MLP(c, execution, init, rngs=rngs)

    def encode(
        self, x_BID: jax.Array, visibility: Visibility, key: jax.Array | None = None
    ) -> tuple[jax.Array, KeysValues]:
        """The inputs' residual stream after this layer, and the keys and values that they attended to."""
        weights_key, attention_key, hidden_key, mlp_key = dropout_keys(key, 4)
        h_BID = self.attention_norm(x_BID)
        keys_values = self.attention.keys_values(h_BID, visibility.k_positions_BK)
        h_BID = self.attention(h_BID, keys_values, visibility, weights_key)
        x_BID = self.add(x_BID, h_BID, attention_key)
        h_BID = self.mlp(self.mlp_norm(x_BID), hidden_key)
        return self.add(x_BID, h_BID, mlp_key), keys_values

    def memory(self, memory_BID: jax.Array, positions_BI: jax.Array) -> KeysValues:
        """Keys and values of the encoder's stream, normed by the norm of the attention that reads them.

        The encoder's output already has a final norm, so separate cross-attention does not norm it again (T5).
        """
        if self.cross_attention is None:
            return self.attention.keys_values(self.attention_norm(memory_BID), positions_BI)
        normed_BID = memory_BID if self.final_memory else self.cross_norm(memory_BID)
        return self.cross_attention.keys_values(normed_BID, positions_BI)

    def decode(
        self,
        x_BTD: jax.Array,
        memory: KeysValues | None,
        visibility: DecoderVisibility,
        key: jax.Array | None = None,
        cache: KeysValues | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """The targets' residual stream after this layer, and self-attention's keys and values.

        Given a cache, the latter are the updated cache. If attention is merged, the cache contains the memory, and
        `memory` is None.
        """
        weights_key, attention_key, cross_weights_key, cross_key, hidden_key, mlp_key = dropout_keys(key, 6)
        h_BTD = self.attention_norm(x_BTD)
        own = self.attention.keys_values(h_BTD, visibility.own.q_positions_BQ)
        if cache is not None:
            own = cache.insert(own, visibility.own.q_start)
        elif self.cross_attention is None:
            assert memory is not None
            own = own.after(memory)
        h_BTD = self.attention(h_BTD, own, visibility.own, weights_key)
        x_BTD = self.add(x_BTD, h_BTD, attention_key)
        if self.cross_attention is not None:
            h_BTD = self.cross_attention(self.cross_norm(x_BTD), memory, visibility.cross, cross_weights_key)
            x_BTD = self.add(x_BTD, h_BTD, cross_key)
        h_BTD = self.mlp(self.mlp_norm(x_BTD), hidden_key)
        return self.add(x_BTD, h_BTD, mlp_key), own


class T5Like(nnx.Module):
    """An encoder-decoder; a `common.model.Model`."""

    def __init__(self, config: T5LikeConfig, execution: Execution, *, rngs: nnx.Rngs):
        self.config, self.execution = config, execution
        c, recipe = config, config.recipe
        self.merged, self.shared = c.cross_attention == "merged", c.parameters == "shared"
        sees_ahead = c.input_attention == "bidirectional"
        encoder_init = Initialisers(recipe, Scaling.of(c, c.encoder_layers), branches=2)
        decoder_init = Initialisers(recipe, Scaling.of(c, c.decoder_layers), branches=2 if self.merged else 3)
        self.embedding = Embedding(c.vocab_size, c.d_model, recipe, encoder_init, rngs=rngs)
        self.positions = learned_positions(c.max_positions, c.d_model, encoder_init, rngs)
        if not self.shared:
            self.encoder_bias = relative_bias(c.num_heads, sees_ahead, recipe, encoder_init, rngs)
            self.encoder = stack(
                c.encoder_layers, lambda rngs: Layer(c, execution, encoder_init, crosses=False, rngs=rngs), rngs
            )
            self.encoder_norm: Any = make_norm(c.d_model, recipe, rngs) if c.memory == "final" else None
        self.decoder_bias = relative_bias(c.num_heads, sees_ahead and self.shared, recipe, decoder_init, rngs)
        self.decoder = stack(
            c.decoder_layers, lambda rngs: Layer(c, execution, decoder_init, crosses=not self.merged, rngs=rngs), rngs
        )
        self.decoder_norm = make_norm(c.d_model, recipe, rngs)
        if self.shared:
            # The same modules under both names, so that the methods below need not distinguish.
            self.encoder_bias, self.encoder, self.encoder_norm = self.decoder_bias, self.decoder, self.decoder_norm
        self.output = Head(c.vocab_size, c.d_model, recipe, decoder_init, rngs=rngs)

    def hidden(self, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """h_BTD on the target slots, in the activation dtype."""
        rate = self.config.recipe.dropout
        inputs_key, targets_key, encoder_key, memory_key, decoder_key, final_key = dropout_keys(dropout_key, 6)
        x_BID = dropout(self._embed(batch.inputs_BI, batch.input_positions_BI), rate, inputs_key)
        x_BTD = dropout(self._embed(batch.decoder_inputs_BT, batch.target_positions_BT), rate, targets_key)
        within = self._input_visibility(batch.input_segments_BI, batch.input_positions_BI)
        visibility = self._decoder_visibility(batch)
        encoder_keys_N = _layer_keys(encoder_key, self.config.encoder_layers)
        decoder_keys_N = _layer_keys(decoder_key, self.config.decoder_layers)

        if self.config.memory == "layerwise":
            # Layer l of both stacks runs together: the decoder's reads the stream that enters the encoder's.
            def apply_both(layers, x, keys):  # type: ignore[no-untyped-def]
                (encoder, decoder), (x_BID, x_BTD), (encoder_key, decoder_key) = layers, x, keys
                x_BID, memory = self._encode_layer(encoder, decoder, x_BID, within, encoder_key)
                return (x_BID, decoder.decode(x_BTD, memory, visibility, decoder_key)[0]), None

            def apply_last(layers, x, keys):  # type: ignore[no-untyped-def]
                (_, decoder), (x_BID, x_BTD), (_, decoder_key) = layers, x, keys  # the last encoder layer is not read
                memory = decoder.memory(x_BID, batch.input_positions_BI)
                return decoder.decode(x_BTD, memory, visibility, decoder_key)[0], None

            stacks, keys_N = (self.encoder, self.decoder), (encoder_keys_N, decoder_keys_N)
            x_BTD, _ = run_layers(stacks, apply_both, (x_BID, x_BTD), keys_N, self.execution, apply_last)
        else:

            def apply(decoder: Layer, x_BTD: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
                memory = decoder.memory(encoded_BID, batch.input_positions_BI)
                return decoder.decode(x_BTD, memory, visibility, key)[0], None

            encoded_BID = self._encode(x_BID, within, encoder_keys_N, memory_key)
            x_BTD, _ = run_layers(self.decoder, apply, x_BTD, decoder_keys_N, self.execution)
        return self.output(dropout(self.decoder_norm(x_BTD), rate, final_key))

    def head(self) -> jax.Array:
        """w_DV (float32): logits are `hidden @ w_DV`."""
        return self.output.weights(self.embedding)

    def prefill(self, prompt: Prompt, max_new_tokens: int) -> Cache:
        """Encodes the inputs, and keeps their keys and values for every decoder layer.

        The returned cache has room for `max_new_tokens` decoder inputs.
        """
        segments_BI, positions_BI = prompt.segments_BI(), prompt.positions_BI()
        within = dataclasses.replace(self._input_visibility(segments_BI, positions_BI), one_segment=True)
        x_BID = self._embed(prompt.inputs_BI, positions_BI)
        extra = max_new_tokens if self.merged else 0  # merged attention keeps memory and targets in one cache

        if self.config.memory == "layerwise":

            def apply_both(layers: tuple[Layer, Layer], x_BID: jax.Array, _: None) -> tuple[jax.Array, KeysValues]:
                x_BID, memory = self._encode_layer(*layers, x_BID, within, None)
                return x_BID, memory.extend(extra)

            def apply_last(layers: tuple[Layer, Layer], x_BID: jax.Array, _: None) -> tuple[None, KeysValues]:
                return None, layers[1].memory(x_BID, positions_BI).extend(extra)

            _, memory_N = run_layers((self.encoder, self.decoder), apply_both, x_BID, None, self.execution, apply_last)
        else:

            def project(decoder: Layer, _: None, __: None) -> tuple[None, KeysValues]:
                return None, decoder.memory(encoded_BID, positions_BI).extend(extra)

            encoded_BID = self._encode(x_BID, within, None, None)
            _, memory_N = run_layers(self.decoder, project, None, None, self.execution)
        make_cache = Cache.after_inputs if self.merged else Cache.with_memory
        return make_cache(memory_N, prompt, max_new_tokens)

    def decode(self, tokens_BQ: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """h_BQD after the decoder inputs `tokens_BQ`, and the cache with them added."""
        cache, own = cache.advance(tokens_BQ.shape[1], bias_table(self.decoder_bias))
        visibility = DecoderVisibility(own, None if self.merged else cache.memory_visibility(own.q_positions_BQ))

        def apply(
            layer: Layer, x_BQD: jax.Array, caches: tuple[KeysValues | None, KeysValues]
        ) -> tuple[jax.Array, KeysValues]:
            memory, cached = caches
            return layer.decode(x_BQD, memory, visibility, cache=cached)

        x_BQD = self._embed(tokens_BQ, own.q_positions_BQ)
        x_BQD, layers_N = run_layers(self.decoder, apply, x_BQD, (cache.memory, cache.layers), self.execution)
        return self.output(self.decoder_norm(x_BQD)), dataclasses.replace(cache, layers=layers_N)

    def _embed(self, tokens_BL: jax.Array, positions_BL: jax.Array) -> jax.Array:
        return embed(self.embedding, self.positions, tokens_BL, positions_BL, jnp.dtype(self.execution.dtype))

    def _encode(
        self, x_BID: jax.Array, within: Visibility, keys_N: jax.Array | None, memory_key: jax.Array | None
    ) -> jax.Array:
        """The encoder's output, after its final norm."""

        def apply(encoder: Layer, x_BID: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            return encoder.encode(x_BID, within, key)[0], None

        x_BID, _ = run_layers(self.encoder, apply, x_BID, keys_N, self.execution)
        return dropout(self.encoder_norm(x_BID), self.config.recipe.dropout, memory_key)

    def _encode_layer(
        self, encoder: Layer, decoder: Layer, x_BID: jax.Array, within: Visibility, key: jax.Array | None
    ) -> tuple[jax.Array, KeysValues]:
        """Runs one encoder layer on the stream `x_BID`; returns the next stream, and the memory of its decoder layer.

        Memory is layerwise: the decoder layer reads the stream that enters the encoder layer.
        """
        next_BID, keys_values = encoder.encode(x_BID, within, key)
        if self.config.reuses_keys_values:
            return next_BID, keys_values
        return next_BID, decoder.memory(x_BID, within.k_positions_BK)

    def _input_visibility(self, segments_BI: jax.Array, positions_BI: jax.Array) -> Visibility:
        return Visibility(
            q_segments_BQ=segments_BI,
            k_segments_BK=segments_BI,
            q_positions_BQ=positions_BI,
            k_positions_BK=positions_BI,
            causal=self.config.input_attention == "causal",
            bias=bias_table(self.encoder_bias),
            consecutive=True,
        )

    def _decoder_visibility(self, batch: Batch) -> DecoderVisibility:
        """Targets see earlier targets and all inputs of their example.

        Merged attention has the keys of `[inputs | targets]`; separate cross-attention has the inputs' by themselves.
        """
        inputs = (batch.input_segments_BI, batch.input_positions_BI)
        targets = (batch.target_segments_BT, batch.target_positions_BT)
        concatenated = [jnp.concatenate(pair, axis=1) for pair in zip(inputs, targets, strict=True)]
        keys_segments, keys_positions = concatenated if self.merged else targets
        own = Visibility(
            q_segments_BQ=batch.target_segments_BT,
            k_segments_BK=keys_segments,
            q_positions_BQ=batch.target_positions_BT,
            k_positions_BK=keys_positions,
            causal=True,
            q_offset=batch.inputs_BI.shape[1] if self.merged else 0,
            bias=bias_table(self.decoder_bias),
            consecutive=not self.merged,
        )
        if self.merged:
            return DecoderVisibility(own, None)
        # Cross-attention has no relative bias. RoPE counts target positions on from the inputs'.
        cross = Visibility(
            q_segments_BQ=batch.target_segments_BT,
            k_segments_BK=batch.input_segments_BI,
            q_positions_BQ=batch.target_positions_BT,
            k_positions_BK=batch.input_positions_BI,
            causal=False,
        )
        return DecoderVisibility(own, cross)


def _layer_keys(key: jax.Array | None, layers: int) -> jax.Array | None:
    return None if key is None else jax.random.split(key, layers)
