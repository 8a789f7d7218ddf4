"""The packing plan: which examples share a row, by both limits at once, for every arm of a comparison.

A plan follows from token lengths alone, once per (seed, window of examples: an epoch, or a part of one). Rows are then
random access: no stream has to be replayed to find row n. Where arms make examples of different lengths of the same
records, plan over the greater of their lengths, and every arm sees the same examples in the same steps.

Examples are shuffled, then packed first-fit into a bounded number of open rows: the oldest row with room takes the
example; when none has room, the open row with the least room left on its tighter side is closed. Where that saves rows,
long examples go first instead, within stretches of the shuffled order. What that saves depends on how many examples a
row holds: next to nothing of many short ones, a few per cent of few long ones. Best-fit rules (least sum, least square,
least imbalance) and more open rows moved the fill by a few thousandths, up or down.

Legend: E examples, R rows, P packed examples (in row order), X examples too long for a row.
"""

import bisect
import dataclasses
import hashlib
import logging
import operator
import threading
from pathlib import Path
from typing import Protocol

import numpy as np

from common.data.cache import build_once
from common.data.progress import bar
from common.errors import UserError

OPEN_ROWS = 64
"""Rows open at once while packing."""
STRETCH = 1024
"""Examples among which long ones go first."""
PAYS = 0.01
"""Share of the rows that long ones first must save."""
ALGORITHM = f"first-fit {OPEN_ROWS} open rows, or decreasing in {STRETCH}s, v3"
"""Part of a cached plan's name: change it with anything that changes a plan."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """One epoch's rows; every example that fits is in exactly one."""

    row_starts: np.ndarray
    """int64 [R+1]: row r holds `examples_P[row_starts[r]:row_starts[r+1]]`."""
    examples_P: np.ndarray
    """int64: indices into the source."""
    too_long_X: np.ndarray
    """int64: indices of examples that fit no row, ascending."""
    input_fill: float
    """Share of the rows' input slots that hold tokens (0 where rows have none)."""
    target_fill: float

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, number: int) -> np.ndarray:
        """Indices of the examples in row `number`, in their order."""
        return self.examples_P[self.row_starts[number] : self.row_starts[number + 1]]


def plan_epoch(
    input_lengths: np.ndarray, target_lengths: np.ndarray, *, input_limit: int, target_limit: int, seed: int, epoch: int
) -> PackingPlan:
    """Packs examples of the given token lengths (int [E] each) into rows of `input_limit` + `target_limit` slots.

    Raises UserError when there are no examples, or none fits a row.

    >>> plan = plan_epoch(np.array([2, 2, 9]), np.array([1, 1, 1]), input_limit=4, target_limit=2, seed=0, epoch=0)
    >>> len(plan), sorted(plan.row(0).tolist()), plan.too_long_X.tolist(), plan.input_fill
    (1, [0, 1], [2], 1.0)
    """
    inputs_E, targets_E = np.asarray(input_lengths, np.int64), np.asarray(target_lengths, np.int64)
    assert inputs_E.shape == targets_E.shape and inputs_E.ndim == 1
    fits_E = (inputs_E <= input_limit) & (targets_E <= target_limit)
    if not fits_E.any():
        raise UserError(_nothing_fits(inputs_E, targets_E, input_limit, target_limit))
    kept = np.flatnonzero(fits_E)
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    order_P = kept[_shuffle(bits, len(kept))]
    row_P = _pack(inputs_E[order_P], targets_E[order_P], input_limit, target_limit)
    sizes_R = np.bincount(row_P)
    rows = len(sizes_R)
    shuffled = _shuffle(bits, rows)
    rank_R = np.empty(rows, np.int64)
    rank_R[shuffled] = np.arange(rows)
    return PackingPlan(
        row_starts=np.concatenate([[0], np.cumsum(sizes_R[shuffled])]).astype(np.int64),
        examples_P=order_P[np.argsort(rank_R[row_P], kind="stable")],
        too_long_X=np.flatnonzero(~fits_E),
        input_fill=float(inputs_E[kept].sum() / (rows * input_limit)) if input_limit else 0.0,
        target_fill=float(targets_E[kept].sum() / (rows * target_limit)),
    )


class Lengths(Protocol):
    """Examples, as far as planning reads them (see common/data/examples.py)."""

    window: int
    together: int

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class RowPlans:
    """Rows without end. Examples are planned a window at a time, when first needed: an epoch, or a part of it.

    Plans are kept as artifacts in `cache_dir/plans` (None: in memory only). Row numbers run through all windows, so a
    budget may exceed the source. Safe to use from several threads.
    """

    def __init__(
        self, examples: Lengths, *, input_limit: int, target_limit: int, seed: int, cache_dir: Path | None
    ) -> None:
        self._examples = examples
        self._limits = (input_limit, target_limit)
        self._seed = seed
        self._folder = None if cache_dir is None else cache_dir / "plans"
        self._lock = threading.RLock()
        self._starts: tuple[tuple[int, int], ...] = ((0, 0),)
        """(window, its first row) where that is known, ascending; replaced as a whole, so that none needs the lock to
        read it."""
        self._recent: dict[int, PackingPlan] = {}

    def plan(self, window: int) -> PackingPlan:
        """The plan of one window, whose examples are numbered from 0. The first names, in one warning, the examples
        that are too long for a row."""
        with self._lock:
            if window not in self._recent:
                plan = self._load_or_make(window)
                if not self._recent and len(plan.too_long_X):
                    self._warn(plan.too_long_X)
                for old in sorted(self._recent)[:-1]:  # a batch spans two windows at most, unless they are tiny
                    del self._recent[old]
                self._recent[window] = plan
            self._learn_next(window, len(self._recent[window]))
            return self._recent[window]

    def locate(self, row: int) -> tuple[int, int]:
        """(window, row within that window) of global row number `row`."""
        assert row >= 0
        while True:
            starts = self._starts
            place = bisect.bisect_right(starts, row, key=operator.itemgetter(1)) - 1
            window, first = starts[place]
            if place + 1 < len(starts) and starts[place + 1][0] == window + 1:
                return window, row - first
            self.plan(window)  # also finds where the next window starts

    def landmark(self, row: int) -> tuple[int, int]:
        """(window of global row number `row`, that window's first row): what `recall` takes."""
        window, within = self.locate(row)
        return window, row - within

    def recall(self, window: int, first_row: int) -> None:
        """Takes a landmark, so that no window before it has to be planned for rows from there on."""
        with self._lock:
            if (window, first_row) not in self._starts:
                self._starts = tuple(sorted((*self._starts, (window, first_row))))

    def row(self, row: int) -> np.ndarray:
        """Numbers int64 of the examples in global row `row`."""
        window, number = self.locate(row)
        return self.numbers(window, number)

    def numbers(self, window: int, row: int) -> np.ndarray:
        """Numbers int64 of the examples in a window's row."""
        together = self._examples.together
        found = self.plan(window).row(row)
        return window * self._examples.window + (found[:, None] * together + np.arange(together)).ravel()

    def _learn_next(self, window: int, rows: int) -> None:
        """Records where the next window starts, if the start of this one is known."""
        starts = self._starts
        after = bisect.bisect_right(starts, window, key=operator.itemgetter(0))
        known, first = starts[after - 1]
        if known == window and (after == len(starts) or starts[after][0] != window + 1):
            self._starts = (*starts[:after], (window + 1, first + rows), *starts[after:])

    def _load_or_make(self, window: int) -> PackingPlan:
        size, together = self._examples.window, self._examples.together
        lengths = self._examples.lengths(np.arange(window * size, (window + 1) * size))
        inputs_E, targets_E = (side.reshape(-1, together).sum(axis=1) for side in lengths)
        input_limit, target_limit = self._limits

        def make() -> PackingPlan:
            return plan_epoch(
                inputs_E, targets_E, input_limit=input_limit, target_limit=target_limit, seed=self._seed, epoch=window
            )

        if self._folder is None:
            return make()
        digest = hashlib.blake2b(inputs_E.tobytes() + targets_E.tobytes()).hexdigest()
        identity = f"{ALGORITHM}|{digest}|{self._limits}|{self._seed}|{window}"
        path = self._folder / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.npz"
        return load_plan(build_once(path, lambda part: save_plan(make(), part)))

    def _warn(self, too_long_X: np.ndarray) -> None:
        named = ", ".join(map(str, too_long_X[:10])) + (", ..." if len(too_long_X) > 10 else "")
        _log.warning(
            "%d of %d examples are longer than a row (%d input, %d target tokens) and are left out: %s",
            *(len(too_long_X), self._examples.window, *self._limits, named),
        )


def save_plan(plan: PackingPlan, path: Path) -> None:
    """Writes a plan as .npz, whatever `path` ends in."""
    with path.open("wb") as file:
        np.savez(file, **{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)})


def load_plan(path: Path) -> PackingPlan:
    """Reads what `save_plan` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return PackingPlan(
            row_starts=stored["row_starts"],
            examples_P=stored["examples_P"],
            too_long_X=stored["too_long_X"],
            input_fill=float(stored["input_fill"]),
            target_fill=float(stored["target_fill"]),
        )


def _shuffle(bits: np.random.Philox, n: int) -> np.ndarray:
    """A permutation of `n`. NumPy promises the raw bits of a generator for all versions, but not what its
    `permutation` makes of them."""
    return np.argsort(bits.random_raw(n), kind="stable")


def _pack(inputs_P: np.ndarray, targets_P: np.ndarray, input_limit: int, target_limit: int) -> np.ndarray:
    """Row numbers int64 [P]. Pieces of text are all of one length but perhaps the last: no search is needed, and the
    last one goes to the first row that has room for it."""
    usual = inputs_P[0], targets_P[0]
    if len(inputs_P) > 2 and usual != (inputs_P[1], targets_P[1]):
        usual = inputs_P[2], targets_P[2]  # one of the first two is the odd one, if there is only one
    odd_P = (inputs_P != usual[0]) | (targets_P != usual[1])
    if np.count_nonzero(odd_P) > 1:
        in_turn = _first_fit(inputs_P.tolist(), targets_P.tolist(), input_limit, target_limit)
        longest_first = _decreasing(inputs_P, targets_P, input_limit, target_limit)
        return longest_first if longest_first.max() + 1 <= (1 - PAYS) * (in_turn.max() + 1) else in_turn
    limits = input_limit, target_limit
    fitting = [limit // n for n, limit in zip(usual, limits, strict=True) if n]
    row_P = (np.cumsum(~odd_P) - 1) // min(fitting, default=len(inputs_P))
    for odd in np.flatnonzero(odd_P).tolist():
        sizes_R = np.bincount(row_P[~odd_P])
        needs = inputs_P[odd], targets_P[odd]
        room_R = [n * sizes_R + need <= limit for n, need, limit in zip(usual, needs, limits, strict=True)]
        row_P[odd] = [*np.flatnonzero(room_R[0] & room_R[1]), len(sizes_R)][0]
    return row_P


def _first_fit(inputs: list[int], targets: list[int], input_limit: int, target_limit: int) -> np.ndarray:
    """Row numbers int64 [P] of examples in their order. Plain lists: several times faster here than small arrays."""
    open_rows: list[list[int]] = []  # [free input slots, free target slots, row number], oldest first
    row_P = np.empty(len(inputs), np.int64)
    rows = 0
    chunk = 50_000
    for start in bar(range(0, len(inputs), chunk), "packing rows"):
        chosen = []
        for n_i, n_t in zip(inputs[start : start + chunk], targets[start : start + chunk], strict=True):
            for row in open_rows:
                if row[0] >= n_i and row[1] >= n_t:
                    break
            else:
                if len(open_rows) == OPEN_ROWS:
                    open_rows.remove(min(open_rows, key=lambda row: min(row[0], row[1])))
                row = [input_limit, target_limit, rows]
                open_rows.append(row)
                rows += 1
            row[0] -= n_i
            row[1] -= n_t
            chosen.append(row[2])
        row_P[start : start + chunk] = chosen
    return row_P


def _decreasing(inputs_P: np.ndarray, targets_P: np.ndarray, input_limit: int, target_limit: int) -> np.ndarray:
    """Row numbers int64 [P]: in each stretch the longest go first, each into its oldest row with room."""
    length_P = np.maximum(inputs_P / max(input_limit, 1), targets_P / target_limit)
    row_P = np.empty(len(inputs_P), np.int64)
    rows = 0
    for start in range(0, len(inputs_P), STRETCH):
        order = start + np.argsort(-length_P[start : start + STRETCH], kind="stable")
        least_i, least_t = int(inputs_P[order].min()), int(targets_P[order].min())
        free: list[list[int]] = []
        chosen = []
        begin = 0  # rows before it have no room for anything
        for n_i, n_t in zip(inputs_P[order].tolist(), targets_P[order].tolist(), strict=True):
            row = begin
            while row < len(free) and (free[row][0] < n_i or free[row][1] < n_t):
                row += 1
            if row == len(free):
                free.append([input_limit, target_limit])
            free[row][0] -= n_i
            free[row][1] -= n_t
            chosen.append(row)
            while begin < len(free) and (free[begin][0] < least_i or free[begin][1] < least_t):
                begin += 1
        row_P[order] = np.array(chosen) + rows
        rows += len(free)
    return row_P


def _nothing_fits(inputs_E: np.ndarray, targets_E: np.ndarray, input_limit: int, target_limit: int) -> str:
    if not len(inputs_E):
        return "the source has no examples to pack"
    return (
        f"none of {len(inputs_E)} examples fits a row of {input_limit} input and {target_limit} target tokens; "
        f"the shortest has {inputs_E.min()} and {targets_E.min()}: raise data.input_length or data.target_length"
    )
