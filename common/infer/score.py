"""Log-likelihoods of given targets, token by token, many examples a row.

Examples are packed as in training, with those of a similar length into rows of one of few shapes, so that few programs
are compiled. What an example scores depends on nothing but itself, beyond rounding.

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
"""Slots of a row, of its inputs and of its targets each: the least that holds an example; packing fills the rest."""
PAD = 0
"""Padding is never read, so any id will do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Targets to be scored behind inputs; made by `pair` or `continuation`."""

    example: Example
    start_id: int
    """The first decoder input; the others are the targets but the last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What a model says of one pair's targets, each given the inputs and the targets before it."""

    log_probs_T: np.ndarray
    """float32, in nats."""
    greedy_T: np.ndarray
    """bool: the target is the model's first choice."""
    weights_T: np.ndarray
    """The pair's own: which targets were asked for."""

    @property
    def log_likelihood(self) -> float:
        """Of the targets that were asked for; 0 where there is none."""
        return float(np.dot(self.log_probs_T.astype(np.float64), self.weights_T))

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would have written every target that was asked for."""
        return bool(self.greedy_T[self.weights_T > 0].all())

    @property
    def tokens(self) -> int:
        """How many targets were asked for."""
        return int(np.count_nonzero(self.weights_T))


def pair(inputs: Sequence[int] | np.ndarray, targets: Sequence[int] | np.ndarray, *, start_id: int) -> Pair:
    """All targets behind inputs; either may be empty."""
    targets_T = np.asarray(targets, np.int32)
    weights_T = np.ones(len(targets_T), np.float32)
    return Pair(
        example=Example(inputs_I=np.asarray(inputs, np.int32), targets_T=targets_T, weights_T=weights_T),
        start_id=start_id,
    )


def continuation(
    context: Sequence[int] | np.ndarray, text: Sequence[int] | np.ndarray, *, start_id: int | None
) -> Pair:
    """For a language model: empty inputs, context and continuation are targets, weights choose the continuation.

    Without a start token (`start_id` None: models that know none between texts) the context's first token is the first
    decoder input, and must be there.

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


def refuse_long(name: str, pair: Pair, longest: int, model: Skeleton) -> None:
    """Raises UserError for a pair that no row can hold, or with more positions than the model has."""
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
    """The score of each pair, in the order given.

    `rows` rows of packed examples go through the model at a time, and logits exist for `execution.loss_chunk` positions
    of a device's rows. `advance` is called with the number of examples just done. Compiled programs serve later
    calls with the same model.

    Raises UserError, naming the example, for one that is longer than the greatest of `lengths`, or whose inputs and
    targets together have more positions than the model, and where `rows` do not divide over the mesh.
    """
    row_parts = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    if rows % row_parts:
        raise UserError(
            f"rows is {rows}, which does not divide over {row_parts} devices; "
            f"nearest: {-(-rows // row_parts) * row_parts}"
        )
    for i, p in enumerate(pairs):
        refuse_long(f"pairs[{i}]", p, max(lengths), model)
    program = _program(model, execution)
    scores = [_score(p.example, np.zeros(0, np.float32), np.zeros(0, bool)) for p in pairs]
    advance(sum(not len(p.example.targets_T) for p in pairs))
    with jax.set_mesh(mesh):
        for chosen, batch in _batches(pairs, rows, sorted(lengths)):
            log_probs_BT, greedy_BT = map(gather_to_host, program(params, batch))
            for b, row in enumerate(chosen):
                begin = 0
                for i in row:
                    slots = slice(begin, begin := begin + len(pairs[i].example.targets_T))
                    scores[i] = _score(pairs[i].example, log_probs_BT[b, slots], greedy_BT[b, slots])
            advance(sum(map(len, chosen)))
    return scores


def target_log_probs(
    h_BTD: jax.Array, w_DV: jax.Array, targets_BT: jax.Array, chunk: int, unroll: bool
) -> tuple[jax.Array, jax.Array]:
    """(float32 [B, T] log-probability of each target, bool [B, T] whether no other id has a greater one).

    Logits never exist for more than `chunk` positions of a device's rows, or one of each row. Products are taken in the
    dtype of `h_BTD` and summed in float32; of equal logits the lowest id is first, as in greedy decoding.
    """
    B, T, _ = h_BTD.shape
    U = slots_at_once(B // num_shards("batch"), T, chunk)
    w_DV = w_DV.astype(h_BTD.dtype)

    def one(h_BUD: jax.Array, targets_BU: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BUV = jnp.einsum("BUD,DV->BUV", h_BUD, w_DV, preferred_element_type=jnp.float32)
        of_target_BU = jnp.take_along_axis(logits_BUV, targets_BU[..., None], axis=-1)[..., 0]
        best_BU = jnp.argmax(logits_BUV, axis=-1).astype(jnp.int32)
        return of_target_BU - jax.nn.logsumexp(logits_BUV, axis=-1), best_BU == targets_BU

    scanned = 0 if unroll else T // U
    pieces = []
    if scanned:
        split = [
            jnp.moveaxis(x[:, : scanned * U].reshape(B, scanned, U, *x.shape[2:]), 1, 0) for x in (h_BTD, targets_BT)
        ]
        pieces.append([jnp.moveaxis(x, 0, 1).reshape(B, scanned * U) for x in jax.lax.map(lambda x: one(*x), split)])
    for start in range(scanned * U, T, U):
        pieces.append([*one(h_BTD[:, start : start + U], targets_BT[:, start : start + U])])
    log_probs, greedy = (jnp.concatenate(x, axis=1) for x in zip(*pieces, strict=True))
    return log_probs, greedy


@functools.lru_cache(maxsize=4)
def _program(model: Skeleton, execution: Execution) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Compiled once for each shape of a batch."""

    def program(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        precision = None if execution.matmul_precision == "default" else execution.matmul_precision
        with jax.default_matmul_precision(precision):
            batch = jax.tree.map(lambda x: constrain(x, "batch", "length"), batch)
            merged = model.merge(params)
            h_BTD, w_DV = merged.hidden(batch), merged.head()
            return target_log_probs(h_BTD, w_DV, batch.targets_BT, execution.loss_chunk, not execution.scan_layers)

    return jax.jit(program)


def _batches(pairs: Sequence[Pair], rows: int, lengths: Sequence[int]) -> Iterator[tuple[list[list[int]], Batch]]:
    """Which examples stand in each row, and the batch; the last of a shape is filled up with empty rows."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, p in enumerate(pairs):
        if len(p.example.targets_T):
            shape = _bucket(len(p.example.inputs_I), lengths), _bucket(len(p.example.targets_T), lengths)
            by_shape.setdefault(shape, []).append(i)
    for (input_length, target_length), members in sorted(by_shape.items()):
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


def _bucket(length: int, lengths: Sequence[int]) -> int:
    """The least row that holds `length` tokens; none at all for none."""
    return 0 if length == 0 else next(x for x in lengths if x >= length)


def _score(example: Example, log_probs_T: np.ndarray, greedy_T: np.ndarray) -> Score:
    return Score(log_probs_T=log_probs_T, greedy_T=greedy_T, weights_T=example.weights_T)
