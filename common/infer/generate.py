"""Many prompts, or one that is shown while it is answered: batches of like lengths, stop strings, and seeds.

Legend: B batch rows, T token slots, R texts a row.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from common.errors import UserError
from common.infer.beam import BeamDecoder
from common.infer.config import Beam, Limits, Method
from common.infer.decode import Decoded, Decoder, Seeds, decoding_weights
from common.infer.prompt import bucket, pad_prompts
from common.infer.stops import find_stop, settled, tokens_to_stop
from common.infer.texts import EncodedPrompt, TextCodec, decode_continuation
from common.model import Skeleton
from common.sharding.shape import ROW_AXES

CHUNK = 16
"""Steps between two looks for stop strings."""
SHOWN = 4
"""Steps between two pieces of text that is shown while it is made."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    prompt: EncodedPrompt
    sample: int = 0
    """Tells apart several texts drawn for one prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    text: str
    tokens: tuple[int, ...]
    """Without the end token; with what holds the stop string."""
    finish: Literal["eos", "stop", "length"]
    log_probability: float
    """Of the tokens, the end token included where there is one, under the model itself; in nats."""
    score: float
    """What several texts of one prompt are ordered by."""


class Generator:
    """One model with one method; programs are compiled once for each length bucket."""

    def __init__(
        self,
        model: Skeleton,
        params: Any,
        mesh: Mesh,
        codec: TextCodec,
        *,
        method: Method,
        limits: Limits,
        rows: int,
        seed: int = 0,
    ):
        self._mesh, self._codec, self._limits, self._seed = mesh, codec, limits, seed
        make = BeamDecoder if isinstance(method, Beam) else Decoder
        self._decoder: Any = make(model, method, codec.conventions.eos_ids)  # type: ignore[arg-type]
        self._rows, self._max_positions = _fitting_rows(rows, mesh), model.max_positions
        with jax.set_mesh(mesh):
            self._weights = decoding_weights(model, params)

    def complete(
        self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """(index of the request, its texts, best first), batch by batch, shortest prompts first.

        A text depends on its request alone, beyond rounding. `on_text` hears pieces of the requests' texts as they are
        made (of single texts: beam search has none before its end).

        Raises UserError, before anything is made, where a prompt and its text may need more positions than the model
        has.
        """
        refuse_positions([request.prompt for request in requests], self._limits, self._max_positions)
        return self._complete(requests, on_text)

    def _complete(
        self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None
    ) -> Iterator[tuple[int, list[Completion]]]:
        order = sorted(range(len(requests)), key=lambda i: requests[i].prompt.length)
        rows = min(self._rows, _fitting_rows(1 << (len(order) - 1).bit_length(), self._mesh)) if order else 0
        for first in range(0, len(order), rows or 1):
            chosen = order[first : first + rows]
            batch = [requests[i] for i in chosen]
            hear = None if on_text is None else lambda row, piece, chosen=chosen: on_text(chosen[row], piece)
            with jax.set_mesh(self._mesh):
                texts = self._batch(batch, rows, hear)
            yield from zip(chosen, texts, strict=True)

    def _batch(
        self, requests: Sequence[Request], rows: int, on_text: Callable[[int, str], None] | None
    ) -> list[list[Completion]]:
        limits = self._limits
        state = self._start(requests, rows)
        watched = [_Watched(request.prompt, self._codec, limits.stop) for request in requests]
        step = limits.max_new_tokens
        if not isinstance(self._decoder, BeamDecoder) and (limits.stop or on_text):
            step = SHOWN if on_text else CHUNK
        stop_B = np.zeros(rows, bool)
        for until in range(step, limits.max_new_tokens + step, step):
            state = self._decoder.advance(self._weights, state, limits, until=until, stop_B=stop_B)
            found = self._decoder.read(state)
            if step < limits.max_new_tokens:
                last = until >= limits.max_new_tokens
                for row, one in enumerate(watched):
                    piece = one.look(_tokens(found, row, 0, self._codec), bool(found.running_B[row]) and not last)
                    stop_B[row] = one.stopped
                    if on_text and piece:
                        on_text(row, piece)
            if not (found.running_B & ~stop_B).any():
                break
        return [[self._completion(found, r, k, one) for k in _places(found, r)] for r, one in enumerate(watched)]

    def _start(self, requests: Sequence[Request], rows: int) -> Any:
        missing = [0] * (rows - len(requests))
        seeds = Seeds(
            seed=self._seed,
            prompts_B=np.array([r.prompt.hash() for r in requests] + missing, np.uint32),
            samples_B=np.array([r.sample for r in requests] + missing, np.uint32),
        )
        prompt = pad_prompts(
            [r.prompt.inputs_I for r in requests],
            [r.prompt.start for r in requests],
            rows=rows,
            written=[r.prompt.written for r in requests],
        )
        slots = bucket(self._limits.max_new_tokens)
        return self._decoder.start(self._weights, prompt, seeds, np.arange(rows) < len(requests), slots=slots)

    def _completion(self, found: Decoded, row: int, place: int, watched: "_Watched") -> Completion:
        tokens = _tokens(found, row, place, self._codec)
        ended = bool(found.ended_BR[row, place])
        stop = tokens_to_stop(lambda n: watched.write(tokens[:n]), 0, len(tokens), self._limits.stop)
        count = len(tokens) if stop is None else stop[0]
        counted = int(found.lengths_BR[row, place]) if stop is None else count
        return Completion(
            text=watched.write(tokens) if stop is None else stop[1],
            tokens=tuple(tokens[:count]),
            finish="stop" if stop is not None else "eos" if ended else "length",
            log_probability=float(found.log_probs_BRT[row, place, :counted].astype(np.float64).sum()),
            score=float(found.scores_BR[row, place]),
        )


class _Watched:
    """A text that grows: what of it can be shown, and whether it holds a stop string."""

    def __init__(self, prompt: EncodedPrompt, codec: TextCodec, stops: tuple[str, ...]):
        self._prompt, self._codec, self._stops = prompt, codec, stops
        self._shown = 0
        self.stopped = False

    def write(self, tokens: Sequence[int]) -> str:
        return decode_continuation(self._prompt, tokens, self._codec)

    def look(self, tokens: Sequence[int], running: bool) -> str:
        """What can newly be shown of the text of all tokens so far."""
        if self.stopped:
            return ""
        text = self.write(tokens)
        place = find_stop(text, self._stops)
        self.stopped = place is not None
        end = place if place is not None else settled(text, self._stops) if running else len(text)
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def refuse_positions(prompts: Sequence[EncodedPrompt], limits: Limits, max_positions: int | None) -> None:
    """Raises UserError where a prompt and what may follow have more positions than the model (None: any number)."""
    longest = max((prompt.length for prompt in prompts), default=0)
    if max_positions is not None and longest + limits.max_new_tokens > max_positions:
        raise UserError(
            f"the longest prompt has {longest} tokens and {limits.max_new_tokens} may follow, but the model knows "
            f"{max_positions} positions; nearest: max_new_tokens={max(0, max_positions - longest)}"
        )


def _tokens(found: Decoded, row: int, place: int, codec: TextCodec) -> list[int]:
    """Without the end token."""
    length = int(found.lengths_BR[row, place]) - bool(found.ended_BR[row, place])
    return found.tokens_BRT[row, place, :length].tolist()


def _places(found: Decoded, row: int) -> list[int]:
    return np.flatnonzero(~np.isneginf(found.scores_BR[row])).tolist()


def _fitting_rows(rows: int, mesh: Mesh) -> int:
    """At least `rows`, and divisible among the devices along the batch."""
    devices = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    return -(-rows // devices) * devices
