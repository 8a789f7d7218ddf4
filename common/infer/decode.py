"""Decoding with a cache, one token a row at a time: greedy or sampled.

Legend: B batch rows, W slots of decoder inputs, P pieces of Q of them, D model, V vocab, U tiles of X words, T token
slots (room for new tokens), R texts a row.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from common.data.batch import Prompt
from common.infer.config import Greedy, Limits, Sample
from common.infer.sampling import sample
from common.model import Model, Skeleton
from common.sharding.hosts import gather_to_host
from common.sharding.rules import constrain

TILE = 128
READ_AT_ONCE = 128
"""Decoder inputs of a prompt that are read together: attention holds the logits of all of them at once."""
FIRST_ROOM = 64
"""Tokens for which there is room at first; each time it is used up, there is twice as much."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What every step reads: parameters, and the head as the matrix it is used as."""

    params: Any
    head_DV: jax.Array


def decoding_weights(model: Skeleton, params: Any) -> Weights:
    """Done once a model, so that no step and no batch has to."""
    return Weights(params=model.for_decoding(params), head_DV=model.merge(params).head())


def read(model: Model, prompt: Prompt, room: int) -> Any:
    """A cache that holds all of the prompt but its `starts_B`, and has room for `room` decoder inputs after it."""
    if prompt.written_BW is None:
        return model.prefill(prompt, room)
    tokens_BW = prompt.written_BW
    B, W = tokens_BW.shape
    at_once = math.gcd(W, READ_AT_ONCE) if W > READ_AT_ONCE else W

    def go_on(cache: Any, tokens_BQ: jax.Array) -> tuple[Any, None]:
        return model.decode(tokens_BQ, cache)[1], None

    pieces_PBQ = tokens_BW.reshape(B, W // at_once, at_once).swapaxes(0, 1)
    cache, _ = jax.lax.scan(go_on, model.prefill(prompt, W + room), pieces_PBQ)
    return cache.mask_padding(W, prompt.written_lengths_B)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds:
    """Where each row's random numbers come from: the run's seed, then the row's own two numbers; uint32 each.

    They belong to the prompt, not to its place in a batch: `prompts_B` is a hash of it, `samples_B` tells apart several
    texts made from one prompt.
    """

    seed: int
    prompts_B: np.ndarray
    samples_B: np.ndarray

    def keys_B(self) -> jax.Array:
        def key(prompt: jax.Array, sample: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), prompt), sample)

        return jax.vmap(key)(jnp.asarray(self.prompts_B, jnp.uint32), jnp.asarray(self.samples_B, jnp.uint32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """What has been made so far, best first where a row has several texts; NumPy arrays that nothing will change."""

    tokens_BRT: np.ndarray
    """The end token included; arbitrary after `lengths_BR`."""
    log_probs_BRT: np.ndarray
    """Each token's log-probability under the model itself: no temperature, no filter."""
    lengths_BR: np.ndarray
    ended_BR: np.ndarray
    """Whether the text has its end token."""
    scores_BR: np.ndarray
    """What texts are ordered by."""
    running_B: np.ndarray
    """Whether the row would go on."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Between two steps."""

    step: jax.Array
    """Tokens made."""
    token_B: jax.Array
    """The next decoder inputs."""
    cache: Any
    keys_B: jax.Array
    tokens_BT: jax.Array
    log_probs_BT: jax.Array
    lengths_B: jax.Array
    ended_B: jax.Array
    stopped_B: jax.Array
    """Ended, or told to stop."""
    slots: int = dataclasses.field(metadata={"static": True})
    """Tokens for which there can be room."""

    @property
    def room(self) -> int:
        """Tokens for which there is room."""
        return self.tokens_BT.shape[1]

    def with_room(self, room: int) -> "State":
        more = room - self.room
        return dataclasses.replace(
            self,
            cache=self.cache.extend(more),
            tokens_BT=jnp.pad(self.tokens_BT, ((0, 0), (0, more))),
            log_probs_BT=jnp.pad(self.log_probs_BT, ((0, 0), (0, more))),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits as the programs take them: numbers that may change without compiling anew; int32 scalars."""

    until: Any
    at_most: Any
    at_least: Any

    @classmethod
    def of(cls, limits: Limits, until: int | None) -> "Bounds":
        at_most = limits.max_new_tokens
        return cls(
            until=np.int32(at_most if until is None else min(until, at_most)),
            at_most=np.int32(at_most),
            at_least=np.int32(limits.min_new_tokens),
        )


class Decoder:
    """Compiled programs for greedy decoding or sampling: one for each shape of prompt and each room for tokens."""

    def __init__(self, model: Skeleton, method: Greedy | Sample, eos_ids: Sequence[int]):
        self._model, self._method, self._eos_ids = model, method, tuple(eos_ids)
        self._start = jax.jit(self._begin, static_argnames="slots")
        self._advance = jax.jit(self._run, donate_argnames="state")
        self._grow = jax.jit(State.with_room, static_argnames="room")

    def start(self, weights: Weights, prompt: Prompt, seeds: Seeds, present_B: np.ndarray, *, slots: int) -> State:
        """Reads the prompts; rows that are not `present_B` make nothing. `slots` bounds what can be made."""
        return self._start(weights, prompt, seeds.keys_B(), present_B, slots=slots)

    def advance(
        self,
        weights: Weights,
        state: State,
        limits: Limits,
        *,
        until: int | None = None,
        stop_B: np.ndarray | None = None,
    ) -> State:
        """Goes on until every row has ended or has as many tokens as `limits` say, or `until` of them.

        Rows of `stop_B` are told to stop. `state` is given away. However the steps are divided among calls, the tokens
        are the same.
        """
        stop_B = np.zeros(state.stopped_B.shape, bool) if stop_B is None else stop_B
        bounds = Bounds.of(limits, until)
        return in_rooms(state, bounds, self._grow, lambda state, bounds: self._advance(weights, state, stop_B, bounds))

    def read(self, state: State) -> Decoded:
        """Copies, so that the state can still be given away."""
        log_probs_BT, lengths_B = gather_to_host(state.log_probs_BT), gather_to_host(state.lengths_B)
        made_BT = np.arange(log_probs_BT.shape[1]) < lengths_B[:, None]
        return Decoded(
            tokens_BRT=gather_to_host(state.tokens_BT)[:, None],
            log_probs_BRT=log_probs_BT[:, None],
            lengths_BR=lengths_B[:, None],
            ended_BR=gather_to_host(state.ended_B)[:, None],
            scores_BR=np.where(made_BT, log_probs_BT, 0.0).sum(axis=1, keepdims=True),
            running_B=~gather_to_host(state.stopped_B),
        )

    def programs(self) -> tuple[int, int]:
        """How many have been compiled so far: for reading prompts, and for going on."""
        return self._start._cache_size(), self._advance._cache_size()  # type: ignore[attr-defined]

    def _begin(self, weights: Weights, prompt: Prompt, keys_B: jax.Array, present_B: jax.Array, slots: int) -> State:
        B, room = prompt.lengths_B.shape[0], min(slots, FIRST_ROOM)
        # Apart, because each is given away with the state.
        return State(
            step=jnp.int32(0),
            token_B=prompt.starts_B,
            cache=read(self._model.merge(weights.params), prompt, room),
            keys_B=keys_B,
            tokens_BT=jnp.zeros((B, room), jnp.int32),
            log_probs_BT=jnp.zeros((B, room), jnp.float32),
            lengths_B=jnp.zeros((B,), jnp.int32),
            ended_B=jnp.zeros((B,), bool),
            stopped_B=~present_B,
            slots=slots,
        )

    def _run(self, weights: Weights, state: State, stop_B: jax.Array, bounds: "Bounds") -> State:
        model = self._model.merge(weights.params)

        def unfinished(state: State) -> jax.Array:
            return (state.step < bounds.until) & ~state.stopped_B.all()

        def step(state: State) -> State:
            h_B1D, cache = model.decode(state.token_B[:, None], state.cache)
            logits_BV = next_logits(h_B1D[:, 0], weights.head_DV)
            allowed_BV = forbid(logits_BV, self._eos_ids, state.step < bounds.at_least)
            token_B = self._choose(allowed_BV, state)
            at_B1 = token_B[:, None]
            log_probs_B1 = jnp.take_along_axis(logits_BV, at_B1, axis=1) - jax.nn.logsumexp(
                logits_BV, axis=-1, keepdims=True
            )
            running_B = ~state.stopped_B
            ended_B = state.ended_B | (running_B & is_one_of(token_B, self._eos_ids))
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.step, axis=1)
            return State(
                step=state.step + 1,
                token_B=token_B,
                cache=cache,
                keys_B=state.keys_B,
                tokens_BT=write(state.tokens_BT, at_B1),
                log_probs_BT=write(state.log_probs_BT, log_probs_B1),
                lengths_B=state.lengths_B + running_B.astype(jnp.int32),
                ended_B=ended_B,
                stopped_B=state.stopped_B | ended_B,
                slots=state.slots,
            )

        return jax.lax.while_loop(unfinished, step, dataclasses.replace(state, stopped_B=state.stopped_B | stop_B))

    def _choose(self, logits_BV: jax.Array, state: State) -> jax.Array:
        match self._method:
            case Greedy():
                return first_argmax(logits_BV)
            case Sample():
                keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.keys_B, state.step)
                return sample(logits_BV, keys_B, self._method)


class Roomy(Protocol):
    """A state between two steps."""

    @property
    def stopped_B(self) -> jax.Array: ...

    @property
    def slots(self) -> int: ...

    @property
    def room(self) -> int: ...


Growing = TypeVar("Growing", bound=Roomy)


def in_rooms(
    state: Growing,
    bounds: Bounds,
    grow: Callable[..., Growing],
    run: Callable[[Growing, Bounds], Growing],
) -> Growing:
    """Runs to the bounds, and makes room on the way.

    A step reads its whole cache, so that its cost follows what has been made instead of what could be; and a short
    answer needs no program for long ones.
    """
    until = min(int(bounds.until), state.slots)
    while True:
        room = state.room
        state = run(state, dataclasses.replace(bounds, until=np.int32(min(until, room))))
        if room >= until or state.stopped_B.all():
            return state
        state = grow(state, room=min(2 * room, state.slots))


def first_argmax(logits_BV: jax.Array) -> jax.Array:
    """The lowest id among the largest, int32: the tile of U that holds it, then its place there.

    XLA's argmax is slow on a CPU, where this reads all logits once, in a plain maximum.
    """
    tiles_BUX = logits_BV.reshape(len(logits_BV), -1, math.gcd(logits_BV.shape[1], TILE))
    tile_B = jnp.argmax(tiles_BUX.max(axis=2), axis=1).astype(jnp.int32)
    tile_BX = jnp.take_along_axis(tiles_BUX, tile_B[:, None, None], axis=1)[:, 0]
    return tile_B * tiles_BUX.shape[2] + jnp.argmax(tile_BX, axis=1).astype(jnp.int32)


def next_logits(h_BD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """logits_BV in float32."""
    logits_BV = jnp.dot(h_BD, head_DV.astype(h_BD.dtype), preferred_element_type=jnp.float32)
    return constrain(logits_BV, "batch", "vocab")


def is_one_of(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Of any shape; a few comparisons."""
    found = jnp.zeros(tokens.shape, bool)
    for i in ids:
        found |= tokens == i
    return found


def forbid(logits_BV: jax.Array, ids: tuple[int, ...], when: jax.Array) -> jax.Array:
    """With `ids` impossible `when` (a scalar) says so."""
    forbidden_1V = is_one_of(jnp.arange(logits_BV.shape[1], dtype=jnp.int32)[None], ids) & when
    return jnp.where(forbidden_1V, -jnp.inf, logits_BV)
