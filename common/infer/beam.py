"""Beam search with a length penalty, as T5 does it.

Finished texts are kept apart from live ones, and a row ends when no live beam can beat its worst finished text, however
it goes on (Wu et al. 2016, arXiv 1609.08144, section 7; Raffel et al. 2020, arXiv 1910.10683, section 2.1).

Legend: B batch rows, K beams, N candidates, V vocab, T token slots.
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
    in_rooms,
    is_one_of,
    next_logits,
    read,
)
from common.model import Skeleton
from common.sharding.hosts import gather_to_host


def penalty(length: jax.Array, alpha: float) -> jax.Array:
    """((5 + length) / 6)^alpha, float32: what a log-probability is divided by."""
    return ((5.0 + length.astype(jnp.float32)) / 6.0) ** alpha


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Texts:
    """K texts a row; a score of -inf marks an empty place."""

    tokens_BKT: jax.Array
    token_log_probs_BKT: jax.Array
    log_probs_BK: jax.Array
    lengths_BK: jax.Array
    scores_BK: jax.Array

    @classmethod
    def none(cls, rows: int, beams: int, slots: int) -> "Texts":
        return cls(
            tokens_BKT=jnp.zeros((rows, beams, slots), jnp.int32),
            token_log_probs_BKT=jnp.zeros((rows, beams, slots), jnp.float32),
            log_probs_BK=jnp.full((rows, beams), -jnp.inf),
            lengths_BK=jnp.zeros((rows, beams), jnp.int32),
            scores_BK=jnp.full((rows, beams), -jnp.inf),
        )

    def with_room(self, room: int) -> "Texts":
        more = ((0, 0), (0, 0), (0, room - self.tokens_BKT.shape[2]))
        return dataclasses.replace(
            self, tokens_BKT=jnp.pad(self.tokens_BKT, more), token_log_probs_BKT=jnp.pad(self.token_log_probs_BKT, more)
        )

    def take(self, places_BK: jax.Array) -> "Texts":
        return jax.tree.map(lambda x: _take(x, places_BK), self)

    def best(self, count: int) -> tuple["Texts", jax.Array]:
        """The `count` best texts, best first, and their places."""
        places_BK = jax.lax.top_k(self.scores_BK, count)[1]
        return self.take(places_BK), places_BK

    def and_also(self, other: "Texts") -> "Texts":
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self, other)

    def where(self, condition_B: jax.Array, other: "Texts") -> "Texts":
        """Rows of this where the condition holds, of `other` elsewhere."""
        return jax.tree.map(lambda a, b: jnp.where(condition_B.reshape(-1, *(1,) * (a.ndim - 1)), a, b), self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamState:
    """Between two steps."""

    step: jax.Array
    """Tokens made."""
    token_BK: jax.Array
    """The next decoder inputs."""
    cache: Any
    """Its rows are B * K; what was read of the prompt may be shared by a row's beams."""
    live: Texts
    """Best first; all of the same length, and without an end token."""
    finished: Texts
    """Best first."""
    stopped_B: jax.Array
    slots: int = dataclasses.field(metadata={"static": True})
    """Tokens for which there can be room."""

    @property
    def room(self) -> int:
        """Tokens for which there is room."""
        return self.live.tokens_BKT.shape[2]

    def with_room(self, room: int) -> "BeamState":
        return dataclasses.replace(
            self,
            cache=self.cache.extend(room - self.room),
            live=self.live.with_room(room),
            finished=self.finished.with_room(room),
        )


class BeamDecoder:
    """Compiled programs for beam search: one for each shape of prompt and each room for tokens.

    The methods are those of `common.infer.decode.Decoder`; nothing is drawn, so seeds do not matter.
    """

    def __init__(self, model: Skeleton, method: Beam, eos_ids: Sequence[int]):
        self._model, self._method, self._eos_ids = model, method, tuple(eos_ids)
        self._start = jax.jit(self._begin, static_argnames="slots")
        self._advance = jax.jit(self._run, donate_argnames="state")
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
        bounds = Bounds.of(limits, until)
        return in_rooms(state, bounds, self._grow, lambda state, bounds: self._advance(weights, state, stop_B, bounds))

    def read(self, state: BeamState) -> Decoded:
        """Finished texts first, best first among them, then live ones."""
        texts, K = state.finished.and_also(state.live), self._method.size
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

    def _begin(self, weights: Weights, prompt: Prompt, present_B: jax.Array, slots: int) -> BeamState:
        B, K, room = prompt.lengths_B.shape[0], self._method.size, min(slots, FIRST_ROOM)
        none = Texts.none(B, K, room)
        # All beams begin alike, so that only the first may go on.
        first_BK = jnp.broadcast_to(jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)[None], (B, K))
        return BeamState(
            step=jnp.int32(0),
            token_BK=jnp.repeat(prompt.starts_B[:, None], K, axis=1),
            cache=read(self._model.merge(weights.params), prompt, room).repeat_rows(K),
            live=dataclasses.replace(none, log_probs_BK=first_BK, scores_BK=first_BK),
            finished=none,
            stopped_B=~present_B,
            slots=slots,
        )

    def _run(self, weights: Weights, state: BeamState, stop_B: jax.Array, bounds: Bounds) -> BeamState:
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
        B, K, V = log_probs_BKV.shape
        alpha = self._method.length_penalty
        # Enough candidates that K of them live on, even where every beam could end in every way.
        count = K * min(V, 1 + len(self._eos_ids))
        total_BX = (state.live.log_probs_BK[..., None] + log_probs_BKV).reshape(B, K * V)
        total_BN, place_BN = jax.lax.top_k(total_BX, count)
        beam_BN, token_BN = place_BN // V, (place_BN % V).astype(jnp.int32)
        candidates = _append(
            state.live.take(beam_BN), token_BN, _take(log_probs_BKV.reshape(B, K * V), place_BN), total_BN, state.step
        )
        ended_BN = is_one_of(token_BN, self._eos_ids)
        made = state.step + 1
        scores_BN = jnp.where(ended_BN, total_BN / penalty(made, alpha), -jnp.inf)
        finished, _ = state.finished.and_also(dataclasses.replace(candidates, scores_BK=scores_BN)).best(K)
        # Live beams are all of one length, so that their order needs no penalty.
        live, places_BK = dataclasses.replace(candidates, scores_BK=jnp.where(ended_BN, -jnp.inf, total_BN)).best(K)
        live = dataclasses.replace(live, log_probs_BK=live.scores_BK, scores_BK=live.scores_BK / penalty(made, alpha))
        # Log-probabilities only fall: the best score that a beam can still reach has the present one and the length
        # that flatters it most.
        flattering = jnp.maximum(penalty(made + 1, alpha), penalty(max_new_tokens, alpha))
        bound_B = live.log_probs_BK[:, 0] / flattering
        rows_BK = jnp.arange(B, dtype=jnp.int32)[:, None] * K + _take(beam_BN, places_BK)
        return BeamState(
            step=made,
            token_BK=_take(token_BN, places_BK),
            cache=cache.take_rows(rows_BK.reshape(B * K)),
            live=live.where(~state.stopped_B, state.live),
            finished=finished.where(~state.stopped_B, state.finished),
            stopped_B=state.stopped_B | (finished.scores_BK[:, -1] >= bound_B),
            slots=state.slots,
        )


def _append(texts: Texts, token_BN: jax.Array, log_prob_BN: jax.Array, total_BN: jax.Array, step: jax.Array) -> Texts:
    return Texts(
        tokens_BKT=_write(texts.tokens_BKT, token_BN, step),
        token_log_probs_BKT=_write(texts.token_log_probs_BKT, log_prob_BN, step),
        log_probs_BK=total_BN,
        lengths_BK=texts.lengths_BK + 1,
        scores_BK=texts.scores_BK,
    )


def _write(x_BNT: jax.Array, value_BN: jax.Array, step: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BNT, value_BN[..., None], step, axis=2)


def _take(x: jax.Array, places_BK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, places_BK.reshape(*places_BK.shape, *(1,) * (x.ndim - 2)), axis=1)
