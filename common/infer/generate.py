"""Generates text for prompts: batches prompts of similar lengths, cuts at stop strings, streams text as it grows.

Legend: B batch rows, T token slots, R texts per row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from common.data.batch import Prompt
from common.errors import UserError
from common.infer.beam import BeamDecoder
from common.infer.config import Beam, GenerationConfig, Limits, Method
from common.infer.decode import Decoded, Decoder, Seeds, decoding_weights
from common.infer.prompt import bucket, pad_prompts
from common.infer.stops import find_stop, settled_length, tokens_to_stop
from common.infer.texts import EncodedPrompt, TextCodec, decode_continuation
from common.model import Skeleton
from common.sharding.shape import ROW_AXES

STOP_STEPS = 16
"""Steps between two searches for stop strings."""
STREAM_STEPS = 4
"""Steps between two pieces of streamed text."""
CACHED_DECODERS = 32
"""How many decoders a process keeps: one per model (without its parameters) and method."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    prompt: EncodedPrompt
    sample: int = 0
    """Distinguishes several texts drawn for one prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    text: str
    tokens: tuple[int, ...]
    """Without the end token, but with the tokens of the stop string."""
    finish: Literal["eos", "stop", "length"]
    log_probability: float
    """Sum over the tokens and the end token, if there is one, in nats; without temperature and filters."""
    score: float
    """Orders the texts of one prompt."""


class Generator:
    """Generates with one model. Compiles one program per method and shape of prompts.

    Calls that differ in seed, samples or stop strings share programs, and so do calls with about as many prompts, of
    about the same length, whose limits on new tokens are alike. Generators of one model share them too, whatever its
    parameters.
    """

    def __init__(self, model: Skeleton, params: Any, mesh: Mesh, codec: TextCodec):
        self._model, self._mesh, self._codec = model, mesh, codec
        with jax.set_mesh(mesh):
            self._weights = decoding_weights(model, params)

    def complete(
        self,
        requests: Sequence[Request],
        how: GenerationConfig,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yields (index of the request, its texts, best first), batch by batch, shortest prompts first.

        A text depends on its request only, apart from rounding. Beam search returns up to `how.samples` texts for a
        request; other methods return one, so the caller makes `how.decodings` requests for each prompt.
        `on_text(index, piece)` receives pieces of a text as it is generated; beam search has no text before its end.

        Raises UserError before generating anything if a prompt and its text may exceed the model's positions.
        """
        check_positions([request.prompt for request in requests], how.limits, self._model.max_positions)
        return self._complete(requests, how, on_text)

    def _complete(
        self, requests: Sequence[Request], how: GenerationConfig, on_text: Callable[[int, str], None] | None
    ) -> Iterator[tuple[int, list[Completion]]]:
        order = sorted(range(len(requests)), key=lambda i: requests[i].prompt.length)
        devices = math.prod(self._mesh.shape[axis] for axis in ROW_AXES)
        # Few prompts take a power of two, so that one more or less of them needs no other program.
        rows = min(how.rows, -(-(1 << (len(order) - 1).bit_length()) // devices)) * devices if order else 0
        for first in range(0, len(order), rows or 1):
            chosen = order[first : first + rows]
            batch = [requests[i] for i in chosen]
            on_row = None if on_text is None else lambda row, piece, chosen=chosen: on_text(chosen[row], piece)
            with jax.set_mesh(self._mesh):
                texts = self._generate_batch(batch, rows, how, on_row)
            yield from zip(chosen, texts, strict=True)

    def _generate_batch(
        self,
        requests: Sequence[Request],
        rows: int,
        how: GenerationConfig,
        on_text: Callable[[int, str], None] | None,
    ) -> list[list[Completion]]:
        limits = how.limits
        decoder = _decoder(self._model, how.method, tuple(self._codec.conventions.eos_ids))
        slots = bucket(limits.max_new_tokens)
        state = decoder.start(self._weights, *_batch(requests, rows, how.seed), slots=slots)
        streams = [_TextStream(request.prompt, self._codec, limits.stop) for request in requests]
        step = limits.max_new_tokens
        if not isinstance(decoder, BeamDecoder) and (limits.stop or on_text):
            step = STREAM_STEPS if on_text else STOP_STEPS
        stop_B = np.zeros(rows, bool)
        for until in range(step, limits.max_new_tokens + step, step):
            state = decoder.advance(self._weights, state, limits, until=until, stop_B=stop_B)
            found = decoder.read(state)
            if step < limits.max_new_tokens:
                last = until >= limits.max_new_tokens
                for row, stream in enumerate(streams):
                    piece = stream.next_piece(_tokens(found, row, 0), bool(found.running_B[row]) and not last)
                    stop_B[row] = stream.stopped
                    if on_text and piece:
                        on_text(row, piece)
            if not (found.running_B & ~stop_B).any():
                break
        return [
            [_completion(found, row, k, stream, limits) for k in _places(found, row)[: how.samples]]
            for row, stream in enumerate(streams)
        ]


@functools.lru_cache(maxsize=CACHED_DECODERS)
def _decoder(model: Skeleton, method: Method, eos_ids: tuple[int, ...]) -> Any:
    """Returns a decoder, which keeps the programs that it compiles for any parameters of the model."""
    make: Any = BeamDecoder if isinstance(method, Beam) else Decoder
    return make(model, method, eos_ids)


class _TextStream:
    """A growing text: how much of it can be shown, and whether it contains a stop string."""

    def __init__(self, prompt: EncodedPrompt, codec: TextCodec, stops: tuple[str, ...]):
        self._prompt, self._codec, self._stops = prompt, codec, stops
        self._shown = 0
        self.stopped = False

    def decode(self, tokens: Sequence[int]) -> str:
        return decode_continuation(self._prompt, tokens, self._codec)

    def next_piece(self, tokens: Sequence[int], running: bool) -> str:
        """Returns what can be shown now and was not before; `tokens` are all tokens so far."""
        if self.stopped:
            return ""
        text = self.decode(tokens)
        place = find_stop(text, self._stops)
        self.stopped = place is not None
        end = place if place is not None else settled_length(text, self._stops) if running else len(text)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def _batch(requests: Sequence[Request], rows: int, seed: int) -> tuple[Prompt, Seeds, np.ndarray]:
    """Returns `rows` rows of prompts, their seeds, and which rows hold a request, bool [B]."""
    missing = [0] * (rows - len(requests))
    seeds = Seeds(
        seed=seed,
        prompts_B=np.array([r.prompt.hash() for r in requests] + missing, np.uint32),
        samples_B=np.array([r.sample for r in requests] + missing, np.uint32),
    )
    prompt = pad_prompts(
        [r.prompt.inputs_I for r in requests],
        [r.prompt.start for r in requests],
        rows=rows,
        written=[r.prompt.written for r in requests],
    )
    return prompt, seeds, np.arange(rows) < len(requests)


def _completion(found: Decoded, row: int, place: int, stream: _TextStream, limits: Limits) -> Completion:
    tokens = _tokens(found, row, place)
    ended = bool(found.ended_BR[row, place])
    stop = tokens_to_stop(lambda n: stream.decode(tokens[:n]), 0, len(tokens), limits.stop)
    count = len(tokens) if stop is None else stop[0]
    counted = int(found.lengths_BR[row, place]) if stop is None else count
    return Completion(
        text=stream.decode(tokens) if stop is None else stop[1],
        tokens=tuple(tokens[:count]),
        finish="stop" if stop is not None else "eos" if ended else "length",
        log_probability=float(found.log_probs_BRT[row, place, :counted].astype(np.float64).sum()),
        score=float(found.scores_BR[row, place]),
    )


def check_positions(prompts: Sequence[EncodedPrompt], limits: Limits, max_positions: int | None) -> None:
    """Raises UserError if a prompt and the longest text exceed the model's positions (None: unlimited)."""
    longest = max((prompt.length for prompt in prompts), default=0)
    if max_positions is not None and longest + limits.max_new_tokens > max_positions:
        raise UserError(
            f"the longest prompt has {longest} tokens and {limits.max_new_tokens} may follow, but the model has "
            f"{max_positions} positions; nearest: max_new_tokens={max(0, max_positions - longest)}"
        )


def _tokens(found: Decoded, row: int, place: int) -> list[int]:
    """Returns a text's tokens without the end token."""
    length = int(found.lengths_BR[row, place]) - bool(found.ended_BR[row, place])
    return found.tokens_BRT[row, place, :length].tolist()


def _places(found: Decoded, row: int) -> list[int]:
    """Returns the places of a row that hold a text; a beam search may find fewer than its beams."""
    return np.flatnonzero(~np.isneginf(found.scores_BR[row])).tolist()
