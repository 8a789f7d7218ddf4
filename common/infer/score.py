"""Scores given targets: their log-likelihood under a model, token by token.

Examples are packed as in training, into rows of a few shapes by length, so that few programs are compiled. An
example's score depends on the example only, apart from rounding.

Legend: B batch rows, I an example's inputs or a row's input slots, T its targets or target slots, U positions in one
chunk, D model, V vocab.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from common.data.batch import Batch
from common.data.block_layout import lay_out
from common.data.objectives.apply import Example
from common.data.packing import plan_epoch
from common.errors import UserError
from common.model import Skeleton
from common.nn.loss import slots_at_once
from common.recipe import Execution
from common.sharding.hosts import gather_to_host
from common.sharding.rules import constrain, num_shards
from common.sharding.shape import ROW_AXES

LENGTHS = (32, 128, 512, 2048)
"""Input slots and target slots of a row. An example goes to the shortest that holds it; packing fills the rest."""
PAD = 0
"""Any id will do, since padding is never read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Inputs and the targets to score after them; made by `pair` or `continuation`."""

    example: Example
    start_id: int
    """The first decoder input; all targets but the last follow."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Score:
    """A model's score of one pair's targets, each given the inputs and the targets before it."""

    log_probs_T: np.ndarray
    """float32, in nats."""
    greedy_T: np.ndarray
    """bool: whether the target is the model's most probable token."""
    weights_T: np.ndarray
    """The pair's weights: 1 for targets that count, 0 for others."""

    def __repr__(self) -> str:
        """
        >>> Score(log_probs_T=np.array([-1, -2]), greedy_T=np.array([True, False]), weights_T=np.array([1, 1]))
        <-3.000 nats over 2 tokens, loss 1.500>
        """
        return f"<{self.log_likelihood:.3f} nats over {self.tokens} tokens, loss {self.nats_per_token:.3f}>"

    @property
    def log_likelihood(self) -> float:
        """The sum over targets that count, in nats; 0 if there are none."""
        return float(np.dot(self.log_probs_T.astype(np.float64), self.weights_T))

    @property
    def nats_per_token(self) -> float:
        """The mean cross-entropy of the targets that count; 0 if there are none."""
        return mean_loss([self])

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have generated every target that counts."""
        return bool(self.greedy_T[self.weights_T > 0].all())

    @property
    def tokens(self) -> int:
        """The number of targets that count."""
        return int(np.count_nonzero(self.weights_T))


def mean_loss(scores: Sequence[Score]) -> float:
    """Returns the mean cross-entropy of all targets that count, in nats per token; 0 if there are none."""
    return -sum(s.log_likelihood for s in scores) / max(sum(s.tokens for s in scores), 1)


def pair(inputs: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, *, start_id: int) -> Pair:
    """Returns a pair whose targets all count; inputs and targets may be empty."""
    targets_T = np.asarray(targets, np.int32)
    weights_T = np.ones(len(targets_T), np.float32)
    return Pair(
        example=Example(inputs_I=np.asarray(inputs, np.int32), targets_T=targets_T, weights_T=weights_T),
        start_id=start_id,
    )


def continuation(
    context: Sequence[int] | np.ndarray, text: Sequence[int] | np.ndarray, *, start_id: int | None
) -> Pair:
    """Returns a pair for a language model: inputs are empty, context and text are targets, and only the text counts.

    For a model without a start token (`start_id` None) the context's first token is the first decoder input, so the
    context must not be empty.

    >>> native = continuation([7, 8], [9], start_id=None)
    >>> native.start_id, native.example.targets_T.tolist(), native.example.weights_T.tolist()
    (7, [8, 9], [0.0, 1.0])
    """
    both = np.concatenate([np.asarray(context, np.int32), np.asarray(text, np.int32)])
    weights = np.concatenate([np.zeros(len(context), np.float32), np.ones(len(text), np.float32)])
    if start_id is None:
        assert len(context), "a language model without a start token needs a context"
        start_id, both, weights = int(both[0]), both[1:], weights[1:]
    return Pair(
        example=Example(inputs_I=np.zeros(0, np.int32), targets_T=both, weights_T=weights),
        start_id=start_id,
    )


def check_fits(name: str, pair: Pair, longest: int, model: Skeleton) -> None:
    """Raises UserError if no row can hold the pair, or if it exceeds the model's positions."""
    max_positions = model.max_positions
    inputs, targets = len(pair.example.inputs_I), len(pair.example.targets_T)
    has = f"{name} has {inputs} input and {targets} target tokens"
    if max(inputs, targets) > longest:
        raise UserError(f"{has}; the longest row has {longest} of each")
    if max_positions is not None and inputs + targets > max_positions:
        raise UserError(f"{has}; the model has {max_positions} positions")


def score(
    model: Skeleton,
    params: Any,
    mesh: Mesh,
    pairs: Sequence[Pair],
    *,
    execution: Execution,
    rows: int,
    lengths: Sequence[int] = LENGTHS,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """Returns the score of each pair, in order.

    The model reads `rows` rows of packed examples at a time; logits exist for `execution.loss_chunk` positions of a
    device's rows at a time. `advance` is called with the number of pairs just scored. Later calls with the same model
    reuse the compiled programs.

    Raises UserError naming the pair if it is longer than the longest of `lengths` or exceeds the model's positions, and
    if `rows` cannot be divided over the mesh.
    """
    row_parts = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    if rows % row_parts:
        raise UserError(
            f"rows is {rows}, which does not divide over {row_parts} devices; "
            f"nearest: {-(-rows // row_parts) * row_parts}"
        )
    for i, p in enumerate(pairs):
        check_fits(f"pairs[{i}]", p, max(lengths), model)
    program = _program(model, execution)
    scores = [_score(p.example, np.zeros(0, np.float32), np.zeros(0, bool)) for p in pairs]
    advance(sum(not len(p.example.targets_T) for p in pairs))
    with jax.set_mesh(mesh):
        for packed, batch in _batches(pairs, rows, sorted(lengths)):
            log_probs_BT, greedy_BT = map(gather_to_host, program(params, batch))
            for b, members in enumerate(packed):
                begin = 0
                for i in members:
                    slots = slice(begin, begin := begin + len(pairs[i].example.targets_T))
                    scores[i] = _score(pairs[i].example, log_probs_BT[b, slots], greedy_BT[b, slots])
            advance(sum(map(len, packed)))
    return scores


def target_log_probs(
    h_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, chunk: int, unroll: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target, float32 [B, T], and whether it is the most probable id, bool [B, T].

    Logits exist for at most `chunk` positions of a device's rows at a time, or one position per row if that is more.
    Products are computed in the dtype of `h_BTD` and summed in float32. Of equal logits, the lowest id counts as the
    most probable, as in greedy decoding.
    """
    B, T, _ = h_BTD.shape
    U = slots_at_once(B // num_shards("batch"), T, chunk)
    w_DV = w_DV.astype(h_BTD.dtype)

    def score_chunk(h_BUD: jax.Array, targets_BU: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BUV = jnp.einsum("BUD,DV->BUV", h_BUD, w_DV, preferred_element_type=jnp.float32)
        target_logit_BU = jnp.take_along_axis(logits_BUV, targets_BU[..., None], axis=-1)[..., 0]
        best_BU = jnp.argmax(logits_BUV, axis=-1).astype(jnp.int32)
        return target_logit_BU - jax.nn.logsumexp(logits_BUV, axis=-1), best_BU == targets_BU

    scanned = 0 if unroll else T // U
    pieces = []
    if scanned:
        # [B, scanned * U, ...] to [scanned, B, U, ...], and back after the map.
        split = [
            jnp.moveaxis(x[:, : scanned * U].reshape(B, scanned, U, *x.shape[2:]), 1, 0) for x in (h_BTD, targets_BT)
        ]
        pieces.append(
            [jnp.moveaxis(x, 0, 1).reshape(B, scanned * U) for x in jax.lax.map(lambda x: score_chunk(*x), split)]
        )
    for start in range(scanned * U, T, U):
        pieces.append([*score_chunk(h_BTD[:, start : start + U], targets_BT[:, start : start + U])])
    log_probs, greedy = (jnp.concatenate(x, axis=1) for x in zip(*pieces, strict=True))
    return log_probs, greedy


@functools.lru_cache(maxsize=4)
def _program(model: Skeleton, execution: Execution) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Returns a program of (params, batch), as `target_log_probs`; jit compiles it once per batch shape."""

    def program(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        precision = None if execution.matmul_precision == "default" else execution.matmul_precision
        with jax.default_matmul_precision(precision):
            batch = jax.tree.map(lambda x: constrain(x, "batch", "length"), batch)
            merged = model.merge(params)
            h_BTD, w_DV = merged.hidden(batch), merged.head()
            return target_log_probs(h_BTD, w_DV, batch.targets_BT, execution.loss_chunk, not execution.scan_layers)

    return jax.jit(program)


def _batches(pairs: Sequence[Pair], rows: int, lengths: Sequence[int]) -> Iterator[tuple[list[list[int]], Batch]]:
    """Yields the indices of the pairs in each row, and the batch. Empty rows complete the last batch of a shape."""
    for (input_length, target_length), members in sorted(_indices_by_shape(pairs, lengths).items()):
        plan = plan_epoch(
            np.array([len(pairs[i].example.inputs_I) for i in members]),
            np.array([len(pairs[i].example.targets_T) for i in members]),
            input_limit=input_length,
            target_limit=target_length,
            seed=0,
            epoch=0,
        )
        packed = [[members[n] for n in plan.row(r)] for r in range(len(plan))]
        for first in range(0, len(packed), rows):
            chosen = packed[first : first + rows]
            chosen += [[]] * (rows - len(chosen))
            batch = lay_out(
                [[pairs[i].example for i in row] for row in chosen],
                pad_id=PAD,
                starts=[[pairs[i].start_id for i in row] for row in chosen],
                input_length=input_length,
                target_length=target_length,
            )
            yield chosen, batch


def _indices_by_shape(pairs: Sequence[Pair], lengths: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """Groups the pairs that have targets by the lengths (inputs, targets) of the shortest rows that hold them."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, p in enumerate(pairs):
        if len(p.example.targets_T):
            shape = _bucket(len(p.example.inputs_I), lengths), _bucket(len(p.example.targets_T), lengths)
            by_shape.setdefault(shape, []).append(i)
    return by_shape


def _bucket(length: int, lengths: Sequence[int]) -> int:
    """Returns the shortest row length that holds `length` tokens; 0 for 0."""
    return 0 if length == 0 else next(x for x in lengths if x >= length)


def _score(example: Example, log_probs_T: np.ndarray, greedy_T: np.ndarray) -> Score:
    return Score(log_probs_T=log_probs_T, greedy_T=greedy_T, weights_T=example.weights_T)
