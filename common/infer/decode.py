"""Decodes with a cache, one token per row and step, greedily or by sampling.

A state is arrays whose shapes are fixed while a program runs. It has room for a number of new tokens; when the room is
used up it is doubled, and the program of the new shape goes on.

Legend: B batch rows, W decoder input slots of a prompt, P pieces of Q slots each, D model, V vocab, U tiles of X ids,
T token slots (the room), R texts per row.
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
"""Most ids per tile of `first_argmax`."""
READ_AT_ONCE = 128
"""Most decoder inputs of a prompt that are read at once, because attention holds the logits of all of them."""
FIRST_ROOM = 64
"""The room of a new state, in tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What every decoding step reads."""

    params: Any
    """As `Skeleton.for_decoding` returns them."""
    head_DV: jax.Array


def decoding_weights(model: Skeleton, params: Any) -> Weights:
    """Converts parameters once per model, so that no batch and no step has to."""
    return Weights(params=model.for_decoding(params), head_DV=model.merge(params).head())


def read_prompt(model: Model, prompt: Prompt, room: int) -> Any:
    """Returns a cache that holds the prompt without its `starts_B`, with room for `room` more decoder inputs."""
    if prompt.written_BW is None:
        return model.prefill(prompt, room)
    tokens_BW = prompt.written_BW
    B, W = tokens_BW.shape
    Q = math.gcd(W, READ_AT_ONCE) if W > READ_AT_ONCE else W

    def read_piece(cache: Any, tokens_BQ: jax.Array) -> tuple[Any, None]:
        return model.decode(tokens_BQ, cache)[1], None

    pieces_PBQ = tokens_BW.reshape(B, W // Q, Q).swapaxes(0, 1)
    cache, _ = jax.lax.scan(read_piece, model.prefill(prompt, W + room), pieces_PBQ)
    return cache.mask_padding(W, prompt.written_lengths_B)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds:
    """What each row's random key is folded from. It does not depend on the row's place in a batch."""

    seed: int
    prompts_B: np.ndarray
    """uint32, a hash of each prompt."""
    samples_B: np.ndarray
    """uint32, which of several texts drawn for one prompt."""

    def keys_B(self) -> jax.Array:
        """Returns one key per row."""

        def key(prompt: jax.Array, sample: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), prompt), sample)

        return jax.vmap(key)(jnp.asarray(self.prompts_B, jnp.uint32), jnp.asarray(self.samples_B, jnp.uint32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """The texts generated so far, best first if a row has several; copies on the host."""

    tokens_BRT: np.ndarray
    """int32, with the end token; arbitrary after `lengths_BR`."""
    log_probs_BRT: np.ndarray
    """Each token's log-probability, float32 in nats, without temperature and filters."""
    lengths_BR: np.ndarray
    ended_BR: np.ndarray
    """Whether the text has its end token."""
    scores_BR: np.ndarray
    """Scores that order the texts of a row."""
    running_B: np.ndarray
    """Whether more tokens would be generated for the row."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The state of greedy decoding or sampling between two steps."""

    step: jax.Array
    """Tokens generated so far; int32 scalar."""
    token_B: jax.Array
    """The next decoder inputs."""
    cache: Any
    """As `Model.prefill` and `Model.decode` return it."""
    keys_B: jax.Array
    tokens_BT: jax.Array
    log_probs_BT: jax.Array
    lengths_B: jax.Array
    ended_B: jax.Array
    stopped_B: jax.Array
    """Whether the row has ended or the caller has stopped it."""
    slots: int = dataclasses.field(metadata={"static": True})
    """The greatest room."""

    @property
    def room(self) -> int:
        """The number of new tokens that fit."""
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
    """Limits as arguments of a compiled program, int32 scalars: other values need no new compilation."""

    until: Any
    """The number of tokens after which this call returns."""
    at_most: Any
    """`Limits.max_new_tokens`."""
    at_least: Any
    """`Limits.min_new_tokens`."""

    @classmethod
    def of(cls, limits: Limits, until: int | None) -> "Bounds":
        at_most = limits.max_new_tokens
        return cls(
            until=np.int32(at_most if until is None else min(until, at_most)),
            at_most=np.int32(at_most),
            at_least=np.int32(limits.min_new_tokens),
        )


class Decoder:
    """Greedy decoding or sampling; compiles one program for each shape of prompts and each room."""

    def __init__(self, model: Skeleton, method: Greedy | Sample, eos_ids: Sequence[int]):
        self._model, self._method, self._eos_ids = model, method, tuple(eos_ids)
        self._start = jax.jit(self._first_state, static_argnames="slots")
        self._advance = jax.jit(self._generate, donate_argnames="state")
        self._grow = jax.jit(State.with_room, static_argnames="room")

    def start(self, weights: Weights, prompt: Prompt, seeds: Seeds, present_B: np.ndarray, *, slots: int) -> State:
        """Reads the prompts. Rows outside `present_B` generate nothing. At most `slots` tokens fit."""
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
        """Generates until every row has ended or has `until` tokens (default and maximum: `limits.max_new_tokens`).

        Stops the rows in `stop_B`. Donates `state`. Dividing the steps among several calls does not change the tokens.
        """
        stop_B = np.zeros(state.stopped_B.shape, bool) if stop_B is None else stop_B

        def run(state: State, bounds: Bounds) -> State:
            return self._advance(weights, state, stop_B, bounds)

        return run_in_rooms(state, Bounds.of(limits, until), self._grow, run)

    def read(self, state: State) -> Decoded:
        """Copies the results to the host, so the state can still be donated."""
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
        """Returns how many programs have been compiled: for reading prompts, and for generating."""
        return self._start._cache_size(), self._advance._cache_size()  # type: ignore[attr-defined]

    def _first_state(
        self, weights: Weights, prompt: Prompt, keys_B: jax.Array, present_B: jax.Array, slots: int
    ) -> State:
        """Reads the prompts and returns the state before the first step."""
        B, room = prompt.lengths_B.shape[0], min(slots, FIRST_ROOM)
        # Separate arrays: each is donated with the state, and donated buffers must not alias.
        return State(
            step=jnp.int32(0),
            token_B=prompt.starts_B,
            cache=read_prompt(self._model.merge(weights.params), prompt, room),
            keys_B=keys_B,
            tokens_BT=jnp.zeros((B, room), jnp.int32),
            log_probs_BT=jnp.zeros((B, room), jnp.float32),
            lengths_B=jnp.zeros((B,), jnp.int32),
            ended_B=jnp.zeros((B,), bool),
            stopped_B=~present_B,
            slots=slots,
        )

    def _generate(self, weights: Weights, state: State, stop_B: jax.Array, bounds: "Bounds") -> State:
        """Takes steps until `bounds.until` tokens or until all rows have stopped."""
        model = self._model.merge(weights.params)

        def unfinished(state: State) -> jax.Array:
            return (state.step < bounds.until) & ~state.stopped_B.all()

        def step(state: State) -> State:
            h_B1D, cache = model.decode(state.token_B[:, None], state.cache)
            logits_BV = next_logits(h_B1D[:, 0], weights.head_DV)
            allowed_BV = forbid(logits_BV, self._eos_ids, state.step < bounds.at_least)
            token_B = self._choose(allowed_BV, state)
            token_B1 = token_B[:, None]
            log_probs_B1 = jnp.take_along_axis(logits_BV, token_B1, axis=1) - jax.nn.logsumexp(
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
                tokens_BT=write(state.tokens_BT, token_B1),
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


class HasRoom(Protocol):
    """What `run_in_rooms` reads of a state."""

    @property
    def stopped_B(self) -> jax.Array: ...

    @property
    def slots(self) -> int: ...

    @property
    def room(self) -> int: ...


Growing = TypeVar("Growing", bound=HasRoom)


def run_in_rooms(
    state: Growing,
    bounds: Bounds,
    grow: Callable[..., Growing],
    run: Callable[[Growing, Bounds], Growing],
) -> Growing:
    """Runs until the bounds and doubles the room on the way, up to `state.slots`.

    A step reads its whole cache, so its cost follows the tokens generated so far rather than the most that could be,
    and short answers need no program for long ones.
    """
    until = min(int(bounds.until), state.slots)
    while True:
        room = state.room
        state = run(state, dataclasses.replace(bounds, until=np.int32(min(until, room))))
        if room >= until or state.stopped_B.all():
            return state
        state = grow(state, room=min(2 * room, state.slots))


def first_argmax(logits_BV: jax.Array) -> jax.Array:
    """Returns the lowest id of the largest logit, int32 [B]: finds its tile first, then its place within the tile.

    XLA's argmax is slow on a CPU; here all logits are read only once, by a plain maximum.
    """
    tiles_BUX = logits_BV.reshape(len(logits_BV), -1, math.gcd(logits_BV.shape[1], TILE))
    tile_B = jnp.argmax(tiles_BUX.max(axis=2), axis=1).astype(jnp.int32)
    tile_BX = jnp.take_along_axis(tiles_BUX, tile_B[:, None, None], axis=1)[:, 0]
    return tile_B * tiles_BUX.shape[2] + jnp.argmax(tile_BX, axis=1).astype(jnp.int32)


def next_logits(h_BD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Returns the logits of the next token, float32 [B, V]."""
    logits_BV = jnp.dot(h_BD, head_DV.astype(h_BD.dtype), preferred_element_type=jnp.float32)
    return constrain(logits_BV, "batch", "vocab")


def is_one_of(tokens: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Returns whether each token is one of `ids`; bool, in the shape of `tokens`."""
    found = jnp.zeros(tokens.shape, bool)
    for i in ids:
        found |= tokens == i
    return found


def forbid(logits_BV: jax.Array, ids: tuple[int, ...], when: jax.Array) -> jax.Array:
    """Sets the logits of `ids` to -inf if `when`, a bool scalar, is true."""
    forbidden_1V = is_one_of(jnp.arange(logits_BV.shape[1], dtype=jnp.int32)[None], ids) & when
    return jnp.where(forbidden_1V, -jnp.inf, logits_BV)
