"""Beam search with a length penalty, as in T5.

A row keeps its K best finished texts (those with an end token) separate from its K best live ones. It stops when no
continuation of a live text can score more than its worst finished text (Wu et al. 2016, arXiv 1609.08144, section 7;
Raffel et al. 2020, arXiv 1910.10683, section 2.1).

Legend: B batch rows, K beams, N candidates of a step, V vocab, T token slots, X = B * K, E = K * V extensions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.data.batch import Prompt
from common.infer.config import Beam, Limits
from common.infer.decode import (
    FIRST_ROOM,
    Bounds,
    Decoded,
    Seeds,
    Weights,
    forbid,
    is_one_of,
    next_logits,
    read_prompt,
    run_in_rooms,
)
from common.model import Skeleton
from common.sharding.hosts import gather_to_host


def penalty(length: jax.Array, alpha: float) -> jax.Array:
    """Returns ((5 + length) / 6)^alpha, float32, by which a log-probability is divided."""
    return ((5.0 + length.astype(jnp.float32)) / 6.0) ** alpha


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """K texts per row; a score of -inf marks an empty place."""

    tokens_BKT: jax.Array
    token_log_probs_BKT: jax.Array
    log_probs_BK: jax.Array
    lengths_BK: jax.Array
    scores_BK: jax.Array

    @classmethod
    def empty(cls, rows: int, beams: int, slots: int) -> "Texts":
        return cls(
            tokens_BKT=jnp.zeros((rows, beams, slots), jnp.int32),
            token_log_probs_BKT=jnp.zeros((rows, beams, slots), jnp.float32),
            log_probs_BK=jnp.full((rows, beams), -jnp.inf),
            lengths_BK=jnp.zeros((rows, beams), jnp.int32),
            scores_BK=jnp.full((rows, beams), -jnp.inf),
        )

    def with_room(self, room: int) -> "Texts":
        padding = ((0, 0), (0, 0), (0, room - self.tokens_BKT.shape[2]))
        return dataclasses.replace(
            self,
            tokens_BKT=jnp.pad(self.tokens_BKT, padding),
            token_log_probs_BKT=jnp.pad(self.token_log_probs_BKT, padding),
        )

    def take(self, places_BK: jax.Array) -> "Texts":
        return jax.tree.map(lambda x: _take(x, places_BK), self)

    def best(self, count: int) -> tuple["Texts", jax.Array]:
        """Returns the `count` best texts of each row, best first, and their places."""
        places_BK = jax.lax.top_k(self.scores_BK, count)[1]
        return self.take(places_BK), places_BK

    def joined(self, other: "Texts") -> "Texts":
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, other)

    def where(self, condition_B: jax.Array, other: "Texts") -> "Texts":
        """Returns the rows of `self` where the condition holds, those of `other` elsewhere."""
        return jax.tree.map(lambda a, b: jnp.where(condition_B.reshape(-1, *(1,) * (a.ndim - 1)), a, b), self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamState:
    """The state of a beam search between two steps."""

    step: jax.Array
    """Tokens generated so far; int32 scalar."""
    token_BK: jax.Array
    """The next decoder inputs."""
    cache: Any
    """Has B * K rows; a row's beams may share its cache of the prompt."""
    live: Texts
    """Best first; all have the same length and no end token."""
    finished: Texts
    """Best first."""
    stopped_B: jax.Array
    slots: int = dataclasses.field(metadata={"static": True})
    """The greatest room."""

    @property
    def room(self) -> int:
        """The number of new tokens that fit."""
        return self.live.tokens_BKT.shape[2]

    def with_room(self, room: int) -> "BeamState":
        return dataclasses.replace(
            self,
            cache=self.cache.extend(room - self.room),
            live=self.live.with_room(room),
            finished=self.finished.with_room(room),
        )


class BeamDecoder:
    """Beam search; compiles one program for each shape of prompts and each room.

    Its methods are those of `common.infer.decode.Decoder`. Nothing is random, so seeds have no effect.
    """

    def __init__(self, model: Skeleton, method: Beam, eos_ids: Sequence[int]):
        self._model, self._method, self._eos_ids = model, method, tuple(eos_ids)
        self._start = jax.jit(self._first_state, static_argnames="slots")
        self._advance = jax.jit(self._generate, donate_argnames="state")
        self._grow = jax.jit(BeamState.with_room, static_argnames="room")

    def start(self, weights: Weights, prompt: Prompt, seeds: Seeds, present_B: np.ndarray, *, slots: int) -> BeamState:
        return self._start(weights, prompt, present_B, slots=slots)

    def advance(
        self,
        weights: Weights,
        state: BeamState,
        limits: Limits,
        *,
        until: int | None = None,
        stop_B: np.ndarray | None = None,
    ) -> BeamState:
        stop_B = np.zeros(state.stopped_B.shape, bool) if stop_B is None else stop_B

        def run(state: BeamState, bounds: Bounds) -> BeamState:
            return self._advance(weights, state, stop_B, bounds)

        return run_in_rooms(state, Bounds.of(limits, until), self._grow, run)

    def read(self, state: BeamState) -> Decoded:
        """Copies the texts to the host: the finished ones, best first, then live ones."""
        texts, K = state.finished.joined(state.live), self._method.size
        scores_BK, ended_BK = gather_to_host(texts.scores_BK), np.arange(2 * K) < K
        order_BK = np.lexsort((-scores_BK, np.broadcast_to(~ended_BK, scores_BK.shape), np.isneginf(scores_BK)))[:, :K]

        def ordered(x: jax.Array) -> np.ndarray:
            return np.take_along_axis(
                gather_to_host(x), order_BK.reshape(*order_BK.shape, *(1,) * (x.ndim - 2)), axis=1
            )

        return Decoded(
            tokens_BRT=ordered(texts.tokens_BKT),
            log_probs_BRT=ordered(texts.token_log_probs_BKT),
            lengths_BR=ordered(texts.lengths_BK),
            ended_BR=order_BK < K,
            scores_BR=ordered(texts.scores_BK),
            running_B=~gather_to_host(state.stopped_B),
        )

    def _first_state(self, weights: Weights, prompt: Prompt, present_B: jax.Array, slots: int) -> BeamState:
        """Reads the prompts and returns the state before the first step."""
        B, K, room = prompt.lengths_B.shape[0], self._method.size, min(slots, FIRST_ROOM)
        no_texts = Texts.empty(B, K, room)
        # All beams begin alike, so only the first is live.
        first_BK = jnp.broadcast_to(jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)[None], (B, K))
        return BeamState(
            step=jnp.int32(0),
            token_BK=jnp.repeat(prompt.starts_B[:, None], K, axis=1),
            cache=read_prompt(self._model.merge(weights.params), prompt, room).repeat_rows(K),
            live=dataclasses.replace(no_texts, log_probs_BK=first_BK, scores_BK=first_BK),
            finished=no_texts,
            stopped_B=~present_B,
            slots=slots,
        )

    def _generate(self, weights: Weights, state: BeamState, stop_B: jax.Array, bounds: Bounds) -> BeamState:
        """Takes steps until `bounds.until` tokens or until all rows have stopped."""
        model = self._model.merge(weights.params)

        def unfinished(state: BeamState) -> jax.Array:
            return (state.step < bounds.until) & ~state.stopped_B.all()

        def step(state: BeamState) -> BeamState:
            B, K = state.token_BK.shape
            h_X1D, cache = model.decode(state.token_BK.reshape(B * K, 1), state.cache)
            logits_XV = next_logits(h_X1D[:, 0], weights.head_DV)
            log_probs_XV = forbid(jax.nn.log_softmax(logits_XV), self._eos_ids, state.step < bounds.at_least)
            return self._select(state, log_probs_XV.reshape(B, K, -1), cache, bounds.at_most)

        return jax.lax.while_loop(unfinished, step, dataclasses.replace(state, stopped_B=state.stopped_B | stop_B))

    def _select(self, state: BeamState, log_probs_BKV: jax.Array, cache: Any, max_new_tokens: jax.Array) -> BeamState:
        """Extends every live text by every token and keeps the K best texts that ended and the K best that did not."""
        B, K, _ = log_probs_BKV.shape
        alpha, length = self._method.length_penalty, state.step + 1
        candidates, token_BN, beam_BN = self._candidates(state, log_probs_BKV)
        total_BN, ended_BN = candidates.log_probs_BK, is_one_of(token_BN, self._eos_ids)
        scores_BN = jnp.where(ended_BN, total_BN / penalty(length, alpha), -jnp.inf)
        finished, _ = state.finished.joined(dataclasses.replace(candidates, scores_BK=scores_BN)).best(K)
        # All live texts have the same length, so the penalty does not change their order.
        live, place_BK = dataclasses.replace(candidates, scores_BK=jnp.where(ended_BN, -jnp.inf, total_BN)).best(K)
        live = dataclasses.replace(live, log_probs_BK=live.scores_BK, scores_BK=live.scores_BK / penalty(length, alpha))
        # Log-probabilities only fall. So no continuation of a live text can score more than the text's present
        # log-probability, divided by the greatest penalty of the lengths that are still possible.
        greatest = jnp.maximum(penalty(length + 1, alpha), penalty(max_new_tokens, alpha))
        bound_B = live.log_probs_BK[:, 0] / greatest
        # The cache row of beam k of row b is b * K + k.
        cache_row_BK = jnp.arange(B, dtype=jnp.int32)[:, None] * K + _take(beam_BN, place_BK)
        return BeamState(
            step=length,
            token_BK=_take(token_BN, place_BK),
            cache=cache.take_rows(cache_row_BK.reshape(B * K)),
            live=live.where(~state.stopped_B, state.live),
            finished=finished.where(~state.stopped_B, state.finished),
            stopped_B=state.stopped_B | (finished.scores_BK[:, -1] >= bound_B),
            slots=state.slots,
        )

    def _candidates(self, state: BeamState, log_probs_BKV: jax.Array) -> tuple[Texts, jax.Array, jax.Array]:
        """Returns the N most probable one-token extensions of live texts, their last tokens [B, N] and beams [B, N].

        N is K * (1 + number of end tokens): a beam can end in as many ways as there are end tokens, so at least K
        candidates do not end.
        """
        B, K, V = log_probs_BKV.shape
        N = K * min(V, 1 + len(self._eos_ids))
        # [B, K, 1] + [B, K, V], then one axis of K * V extensions: extension x is token x % V of beam x // V.
        total_BE = (state.live.log_probs_BK[..., None] + log_probs_BKV).reshape(B, K * V)
        total_BN, extension_BN = jax.lax.top_k(total_BE, N)
        beam_BN, token_BN = extension_BN // V, (extension_BN % V).astype(jnp.int32)
        token_log_prob_BN = _take(log_probs_BKV.reshape(B, K * V), extension_BN)
        texts = _append(state.live.take(beam_BN), token_BN, token_log_prob_BN, total_BN, state.step)
        return texts, token_BN, beam_BN


def _append(texts: Texts, token_BN: jax.Array, log_prob_BN: jax.Array, total_BN: jax.Array, step: jax.Array) -> Texts:
    """Appends one token to each of N texts (the K of `Texts` is N here); `total_BN` are their log-probabilities."""
    return Texts(
        tokens_BKT=_write(texts.tokens_BKT, token_BN, step),
        token_log_probs_BKT=_write(texts.token_log_probs_BKT, log_prob_BN, step),
        log_probs_BK=total_BN,
        lengths_BK=texts.lengths_BK + 1,
        scores_BK=texts.scores_BK,
    )


def _write(x_BNT: jax.Array, value_BN: jax.Array, step: jax.Array) -> jax.Array:
    """Writes the values at token slot `step`."""
    return jax.lax.dynamic_update_slice_in_dim(x_BNT, value_BN[..., None], step, axis=2)


def _take(x: jax.Array, places_BK: jax.Array) -> jax.Array:
    """Selects entries along axis 1 of [B, N, ...] by their places; [B, K, ...]."""
    return jnp.take_along_axis(x, places_BK.reshape(*places_BK.shape, *(1,) * (x.ndim - 2)), axis=1)
