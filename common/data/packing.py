"""Packing plans: which examples share a row, by both limits at once, for every arm of a comparison.

A plan covers a window of examples (an epoch, or a part of one) and follows from their token lengths and the seed alone.
Rows are then random access: no stream has to be replayed to find row n. If arms make examples of different lengths from
the same records, `common.data.joint` plans over the greater lengths: every arm reads the same examples in each step.

Examples are shuffled, then packed first-fit into a bounded number of open rows: the oldest row with room takes the
example; if none has room, the open row with the least room on its tighter side is closed. Where that saves rows, long
examples go first instead, within stretches of the shuffled order. It saves almost nothing when rows hold many short
examples, a few per cent when they hold few long ones. Best-fit rules (least sum, least square, least imbalance) and
more open rows changed the fill by only a few thousandths.

Numbers and rows are those of the table in `common.data.examples`. Inside one plan, examples and rows are counted from
the start of its window.

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
from common.errors import UserError
from common.progress import tracked

OPEN_ROWS = 64
"""The most rows that are open at once while packing."""
STRETCH = 1024
"""Examples in a stretch, within which long ones may go first."""
WORTHWHILE = 0.01
"""The least share of rows that must be saved for long examples to go first."""
ALGORITHM = f"first-fit {OPEN_ROWS} open rows, or decreasing in {STRETCH}s, v3"
"""Part of a cached plan's key: change it together with anything that changes a plan."""

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingPlan:
    """The rows of one window; every example that fits is in exactly one."""

    row_starts: np.ndarray
    """int64 [R+1]: row r holds `examples_P[row_starts[r]:row_starts[r+1]]`."""
    examples_P: np.ndarray
    """int64: examples, counted from the start of the window."""
    too_long_X: np.ndarray
    """int64: the examples that fit no row, ascending."""
    input_fill: float
    """Share of the rows' input slots that hold tokens (0 if rows have none)."""
    target_fill: float
    """Share of the rows' target slots that hold tokens."""

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, row: int) -> np.ndarray:
        """Returns the examples in one row, in order."""
        return self.examples_P[self.row_starts[row] : self.row_starts[row + 1]]


def plan_epoch(
    input_lengths: np.ndarray, target_lengths: np.ndarray, *, input_limit: int, target_limit: int, seed: int, epoch: int
) -> PackingPlan:
    """Packs examples of these token lengths (int [E] each) into rows of `input_limit` + `target_limit` slots.

    Raises UserError if there are no examples, or none fits a row.

    >>> plan = plan_epoch(np.array([2, 2, 9]), np.array([1, 1, 1]), input_limit=4, target_limit=2, seed=0, epoch=0)
    >>> len(plan), sorted(plan.row(0).tolist()), plan.too_long_X.tolist(), plan.input_fill
    (1, [0, 1], [2], 1.0)
    """
    inputs_E, targets_E = np.asarray(input_lengths, np.int64), np.asarray(target_lengths, np.int64)
    assert inputs_E.shape == targets_E.shape and inputs_E.ndim == 1
    fits_E = (inputs_E <= input_limit) & (targets_E <= target_limit)
    if not fits_E.any():
        raise UserError(_why_nothing_fits(inputs_E, targets_E, input_limit, target_limit))
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


class ExampleLengths(Protocol):
    """The part of `common.data.examples.Examples` that planning reads."""

    window: int
    together: int

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


class RowPlans:
    """The infinite sequence of packed rows. Each window of examples is planned when one of its rows is first needed.

    Rows are counted through all windows, so a budget may exceed the source. Plans are cached in `cache_dir/plans`
    (None: in memory only). Threads may share an object.
    """

    def __init__(
        self,
        examples: ExampleLengths,
        *,
        input_limit: int,
        target_limit: int,
        seed: int,
        cache_dir: Path | None,
        shown: str | None = None,
    ) -> None:
        """Plans rows for examples of these lengths.

        Args:
          shown: describes a row in messages, where the limits are not its slots.
        """
        self._examples, self._shown = examples, shown
        self.limits = (input_limit, target_limit)
        """(input slots, target slots) of a row."""
        self._seed = seed
        self._folder = None if cache_dir is None else cache_dir / "plans"
        self._lock = threading.RLock()
        self._starts: tuple[tuple[int, int], ...] = ((0, 0),)
        """(window, its first row) for each window whose first row is known, ascending. Always replaced as a whole, so
        readers need no lock."""
        self._recent: dict[int, PackingPlan] = {}

    def plan(self, window: int) -> PackingPlan:
        """Returns the plan of one window. The first one logs a warning that names examples too long for a row."""
        with self._lock:
            if window not in self._recent:
                plan = self._load_or_make(window)
                if not self._recent and len(plan.too_long_X):
                    self._warn(plan.too_long_X)
                for old in sorted(self._recent)[:-1]:  # a batch spans at most two windows, unless they are tiny
                    del self._recent[old]
                self._recent[window] = plan
            self._record_next_start(window, len(self._recent[window]))
            return self._recent[window]

    def locate(self, row: int) -> tuple[int, int]:
        """Returns the (window, row of its plan) of a row of the stream."""
        assert row >= 0
        while True:
            starts = self._starts
            last = bisect.bisect_right(starts, row, key=operator.itemgetter(1)) - 1
            window, first_row = starts[last]
            if last + 1 < len(starts) and starts[last + 1][0] == window + 1:
                return window, row - first_row
            self.plan(window)  # also records where the next window starts

    def landmark(self, row: int) -> tuple[int, int]:
        """Returns (the window of a row of the stream, the window's first row), for `recall`."""
        window, plan_row = self.locate(row)
        return window, row - plan_row

    def recall(self, window: int, first_row: int) -> None:
        """Records a landmark, so that rows from there on need no plan of an earlier window."""
        with self._lock:
            if (window, first_row) not in self._starts:
                self._starts = tuple(sorted((*self._starts, (window, first_row))))

    def row(self, row: int) -> np.ndarray:
        """Returns the numbers, int64, of the examples in a row of the stream."""
        return self.numbers(*self.locate(row))

    def numbers(self, window: int, plan_row: int) -> np.ndarray:
        """Returns the numbers, int64, of the examples in a row of a window's plan."""
        together = self._examples.together
        groups = self.plan(window).row(plan_row)  # of `together` examples each
        return window * self._examples.window + (groups[:, None] * together + np.arange(together)).ravel()

    def _record_next_start(self, window: int, rows: int) -> None:
        """Records where the next window starts, if the start of this one is known."""
        starts = self._starts
        after = bisect.bisect_right(starts, window, key=operator.itemgetter(0))
        known, first_row = starts[after - 1]
        if known == window and (after == len(starts) or starts[after][0] != window + 1):
            self._starts = (*starts[:after], (window + 1, first_row + rows), *starts[after:])

    def _load_or_make(self, window: int) -> PackingPlan:
        size, together = self._examples.window, self._examples.together
        lengths = self._examples.lengths(np.arange(window * size, (window + 1) * size))
        inputs_E, targets_E = (side.reshape(-1, together).sum(axis=1) for side in lengths)
        input_limit, target_limit = self.limits

        if self._shown and ((inputs_E > input_limit) | (targets_E > target_limit)).all():
            raise UserError(f"none of {len(inputs_E)} examples fits {self._shown}: longer rows are needed")

        def make() -> PackingPlan:
            return plan_epoch(
                inputs_E, targets_E, input_limit=input_limit, target_limit=target_limit, seed=self._seed, epoch=window
            )

        if self._folder is None:
            return make()
        digest = hashlib.blake2b(inputs_E.tobytes() + targets_E.tobytes()).hexdigest()
        identity = f"{ALGORITHM}|{digest}|{self.limits}|{self._seed}|{window}"
        path = self._folder / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.npz"
        return load_plan(build_once(path, lambda part: save_plan(make(), part)))

    def _warn(self, too_long_X: np.ndarray) -> None:
        shown = self._shown or "a row ({} input, {} target tokens)".format(*self.limits)
        named = ", ".join(map(str, too_long_X[:10])) + (", ..." if len(too_long_X) > 10 else "")
        _log.warning(
            "%d of %d examples are longer than %s and are skipped: %s",
            *(len(too_long_X), self._examples.window, shown, named),
        )


def save_plan(plan: PackingPlan, path: Path) -> None:
    """Writes a plan in NumPy's .npz format, whatever the suffix of `path`."""
    with path.open("wb") as file:
        np.savez(file, **{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)})


def load_plan(path: Path) -> PackingPlan:
    """Reads a plan that `save_plan` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return PackingPlan(
            row_starts=stored["row_starts"],
            examples_P=stored["examples_P"],
            too_long_X=stored["too_long_X"],
            input_fill=float(stored["input_fill"]),
            target_fill=float(stored["target_fill"]),
        )


def _shuffle(bits: np.random.Philox, n: int) -> np.ndarray:
    """Returns a permutation of 0 to `n` - 1. NumPy keeps a generator's raw bits in every version, but not its
    `permutation`."""
    return np.argsort(bits.random_raw(n), kind="stable")


def _pack(inputs_P: np.ndarray, targets_P: np.ndarray, input_limit: int, target_limit: int) -> np.ndarray:
    """Assigns a row to each example, int64 [P].

    Pieces of text all have one length, but perhaps the last: they need no search, and the odd one goes to the first row
    with room for it.
    """
    usual = inputs_P[0], targets_P[0]
    if len(inputs_P) > 2 and usual != (inputs_P[1], targets_P[1]):
        usual = inputs_P[2], targets_P[2]  # one of the first two is the odd one, if there is only one
    odd_P = (inputs_P != usual[0]) | (targets_P != usual[1])
    if np.count_nonzero(odd_P) > 1:
        in_turn = _first_fit(inputs_P.tolist(), targets_P.tolist(), input_limit, target_limit)
        longest_first = _decreasing(inputs_P, targets_P, input_limit, target_limit)
        return longest_first if longest_first.max() + 1 <= (1 - WORTHWHILE) * (in_turn.max() + 1) else in_turn
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
    """Assigns rows first-fit to examples in order, int64 [P]. Lists are several times faster here than small arrays."""
    open_rows: list[list[int]] = []  # [free input slots, free target slots, row], oldest first
    row_P = np.empty(len(inputs), np.int64)
    rows = 0
    chunk = 50_000
    for start in tracked(range(0, len(inputs), chunk), "packing rows"):
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
    """Assigns rows, int64 [P], stretch by stretch: the longest example first, each into the oldest row with room."""
    length_P = np.maximum(inputs_P / max(input_limit, 1), targets_P / target_limit)
    row_P = np.empty(len(inputs_P), np.int64)
    rows = 0
    for start in range(0, len(inputs_P), STRETCH):
        order = start + np.argsort(-length_P[start : start + STRETCH], kind="stable")
        least_i, least_t = int(inputs_P[order].min()), int(targets_P[order].min())
        free: list[list[int]] = []
        chosen = []
        begin = 0  # earlier rows have no room for any example of the stretch
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


def _why_nothing_fits(inputs_E: np.ndarray, targets_E: np.ndarray, input_limit: int, target_limit: int) -> str:
    if not len(inputs_E):
        return "the source has no examples to pack"
    return (
        f"none of {len(inputs_E)} examples fits a row of {input_limit} input and {target_limit} target tokens; "
        f"the shortest has {inputs_E.min()} and {targets_E.min()}: raise data.input_length or data.target_length"
    )
