"""Packing: every example once within both limits, and rows found in any order."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from common.data.packing import PackingPlan, RowPlans, _first_fit, _pack, load_plan, plan_epoch, save_plan
from common.errors import UserError


def random_lengths(seed: int, most: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 300))
    return rng.integers(0, rng.integers(1, most), size), rng.integers(0, rng.integers(1, most), size)


class Fixed:
    """Examples of the same lengths in every epoch."""

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, together: int = 1) -> None:
        self.sides, self.window, self.together = (inputs, targets), len(inputs), together

    def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.sides[0][number_E % self.window], self.sides[1][number_E % self.window]


def rows_of(plan: PackingPlan) -> list[list[int]]:
    return [plan.row(r).tolist() for r in range(len(plan))]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("limits", [(20, 30), (64, 64), (0, 25)])
def test_each_example_once_within_both_limits(seed: int, limits: tuple[int, int]) -> None:
    inputs, targets = random_lengths(seed)
    fits = (inputs <= limits[0]) & (targets <= limits[1])
    if not fits.any():
        with pytest.raises(UserError, match="none of"):
            plan_epoch(inputs, targets, input_limit=limits[0], target_limit=limits[1], seed=seed, epoch=3)
        return
    plan = plan_epoch(inputs, targets, input_limit=limits[0], target_limit=limits[1], seed=seed, epoch=3)
    rows = rows_of(plan)
    assert sorted(i for row in rows for i in row) == np.flatnonzero(fits).tolist()
    assert plan.too_long_X.tolist() == np.flatnonzero(~fits).tolist()
    assert all(inputs[row].sum() <= limits[0] and targets[row].sum() <= limits[1] for row in rows)
    assert all(rows), "a row holds at least one example"
    assert plan.target_fill == pytest.approx(targets[fits].sum() / (len(rows) * limits[1]))
    if limits[0]:
        assert plan.input_fill == pytest.approx(inputs[fits].sum() / (len(rows) * limits[0]))


def test_short_examples_fill_rows() -> None:
    rng = np.random.default_rng(0)
    inputs = np.clip(rng.gamma(3, 4, 20_000) + 2, 1, 100).astype(int)
    targets = np.clip(inputs + rng.integers(-3, 4, len(inputs)), 1, 100)
    plan = plan_epoch(inputs, targets, input_limit=128, target_limit=128, seed=0, epoch=0)
    assert max(plan.input_fill, plan.target_fill) > 0.97


def test_long_examples_go_first_where_it_saves_rows() -> None:
    """Lengths that leave no gaps when sorted: 6 + 4 and 5 + 5, where first-fit in any order opens more rows."""
    lengths = np.repeat([6, 4, 5], 400)
    plan = plan_epoch(lengths, lengths, input_limit=10, target_limit=10, seed=0, epoch=0)
    in_turn = _first_fit(*[np.random.default_rng(0).permutation(lengths).tolist()] * 2, 10, 10).max() + 1
    assert len(plan) < in_turn * 0.99
    assert plan.input_fill > 0.98
    for r in range(len(plan)):
        assert lengths[plan.row(r)].sum() <= 10


def test_a_plan_depends_on_seed_and_epoch() -> None:
    inputs, targets = np.full(200, 3), np.full(200, 4)

    def rows(seed: int, epoch: int) -> list[list[int]]:
        return rows_of(plan_epoch(inputs, targets, input_limit=20, target_limit=20, seed=seed, epoch=epoch))

    assert rows(5, 1) == rows(5, 1)
    drawn = [rows(*key) for key in ((5, 1), (5, 2), (6, 1), (1, 5))]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
    together = {tuple(sorted(row)) for row in drawn[0]}
    assert not together & {tuple(sorted(row)) for row in drawn[1]}, "epochs group examples anew"


def test_the_plan_is_pinned() -> None:
    """Any change here changes every stream: raise the version in `packing.ALGORITHM` together with it."""
    plan = plan_epoch(np.arange(8), np.arange(8)[::-1], input_limit=10, target_limit=10, seed=0, epoch=0)
    assert rows_of(plan) == [[0, 7], [3, 5], [2, 4], [1, 6]]


def test_row_order_is_shuffled() -> None:
    """First-fit leaves later rows emptier; shuffled rows must not show it."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 60, 5000)
    plan = plan_epoch(lengths, lengths, input_limit=64, target_limit=64, seed=0, epoch=0)
    filled = np.array([lengths[plan.row(r)].sum() for r in range(len(plan))])
    assert abs(np.corrcoef(filled, np.arange(len(filled)))[0, 1]) < 0.1


@pytest.mark.parametrize(("lengths", "message"), [([9, 12], "none of 2.*shortest has 9 and 9"), ([], "no examples")])
def test_an_epoch_without_a_fitting_example_is_refused(lengths: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_epoch(np.array(lengths), np.array(lengths), input_limit=8, target_limit=8, seed=0, epoch=0)


def test_too_long_examples_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    examples = Fixed(np.array([1, 9, 1, 1]), np.array([1, 1, 1, 9]))
    plans = RowPlans(examples, input_limit=8, target_limit=8, seed=0, cache_dir=None)
    with caplog.at_level(logging.WARNING):
        for row in range(5):
            assert sorted(plans.row(row) % 4) == [0, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 examples are longer than a row (8 input, 8 target tokens) and are skipped: 1, 3"
    ]


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = plan_epoch(*random_lengths(0), input_limit=40, target_limit=40, seed=0, epoch=0)
    save_plan(plan, tmp_path / "plan")
    loaded = load_plan(tmp_path / "plan")
    for field in dataclasses.fields(plan):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(plan, field.name))


def test_the_cache_distinguishes_everything_a_plan_depends_on(tmp_path: Path) -> None:
    lengths = np.full(50, 3)
    base = {"examples": Fixed(lengths, lengths), "input_limit": 9, "target_limit": 9, "seed": 0}
    other = lengths.copy()
    other[7] = 2
    fixed = [{"examples": Fixed(other, lengths)}, {"examples": Fixed(lengths, other)}]
    changes: list[dict] = [{}, *fixed, {"input_limit": 10}, {"seed": 1}]
    for number, change in enumerate(changes, start=1):
        plans = RowPlans(**{**base, **change}, cache_dir=tmp_path)
        rows = rows_of(plans.plan(0))
        assert len(list((tmp_path / "plans").glob("*.npz"))) == number
        assert rows_of(RowPlans(**{**base, **change}, cache_dir=tmp_path).plan(0)) == rows
        assert rows_of(RowPlans(**{**base, **change}, cache_dir=None).plan(0)) == rows
        assert len(list((tmp_path / "plans").glob("*.npz"))) == number


@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_rows_are_found_through_epochs_in_any_order(order: str) -> None:
    inputs, targets = random_lengths(5)
    limits = {"input_limit": 40, "target_limit": 40, "seed": 2}
    epochs = [rows_of(plan_epoch(inputs, targets, **limits, epoch=epoch)) for epoch in range(4)]
    assert len({len(rows) for rows in epochs}) > 1, "epochs have unequal numbers of rows, which makes this hard"
    expected = [(epoch, number, row) for epoch, rows in enumerate(epochs) for number, row in enumerate(rows)]
    numbers = np.arange(len(expected))
    if order != "forward":
        numbers = numbers[::-1] if order == "backward" else np.random.default_rng(0).permutation(numbers)
    plans = RowPlans(Fixed(inputs, targets), **limits, cache_dir=None)
    for n in numbers:
        epoch, number, row = expected[n]
        assert plans.locate(int(n)) == (epoch, number)
        assert plans.row(int(n)).tolist() == [epoch * len(inputs) + i for i in row]


def test_a_landmark_spares_the_windows_before_it() -> None:
    inputs, targets = random_lengths(5)
    limits = {"input_limit": 40, "target_limit": 40, "seed": 2, "cache_dir": None}
    whole, asked = RowPlans(Fixed(inputs, targets), **limits), []

    class Counted(Fixed):
        def lengths(self, number_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            asked.append(int(number_E[0]) // self.window)
            return super().lengths(number_E)

    end = sum(len(whole.plan(window)) for window in range(9))
    for row in (0, end - 1, end, end + 1, end // 2):
        window, within = whole.locate(row)
        plans = RowPlans(Counted(inputs, targets), **limits)
        plans.recall(*whole.landmark(max(0, row - 1)))
        asked.clear()
        assert plans.row(row).tolist() == whole.row(row).tolist() and plans.locate(row) == (window, within)
        assert min(asked) >= window - 1, "the window that the row before is in"
        assert plans.row(1).tolist() == whole.row(1).tolist(), "earlier rows are still found"
        assert plans.locate(end + 99) == whole.locate(end + 99)


@pytest.mark.parametrize("odd", [None, 0, 1, 2, 7])
def test_pieces_of_one_length_are_packed_as_first_fit_packs_them(odd: int | None) -> None:
    """Wherever the shuffle puts a shorter last piece; without one, rows are identical."""
    inputs, targets = np.full(11, 3), np.full(11, 5)
    if odd is not None:
        inputs[odd], targets[odd] = 2, 1
    row_P = _pack(inputs, targets, 9, 11)
    sums = np.stack([np.bincount(row_P, side) for side in (inputs, targets)])
    in_turn = _first_fit(inputs.tolist(), targets.tolist(), 9, 11)
    assert (sums <= [[9], [11]]).all() and row_P.max() <= in_turn.max()
    if odd is None:
        assert row_P.tolist() == in_turn.tolist()


@pytest.mark.parametrize(
    ("lengths", "limit", "rows"),
    [
        ([3, 2], 9, 1),
        ([3, 2], 5, 1),
        ([3, 2], 4, 2),
        ([3, 3, 2], 9, 1),
        ([3, 3, 3, 1], 10, 1),
        ([4, 4, 4, 4, 2], 10, 2),
    ],
)
def test_an_odd_example_shares_a_row_where_it_fits(lengths: list[int], limit: int, rows: int) -> None:
    for seed in range(6):  # it may come first, last or in between
        both = np.array(lengths), np.array(lengths)
        plan = plan_epoch(*both, input_limit=limit, target_limit=limit, seed=seed, epoch=0)
        assert len(plan) == rows
        assert sorted(i for row in rows_of(plan) for i in row) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= limit for row in rows_of(plan))


def test_a_pair_of_examples_shares_a_row() -> None:
    lengths = np.array([1, 4, 2, 3, 4, 1])
    plans = RowPlans(Fixed(lengths, 5 - lengths, together=2), input_limit=5, target_limit=5, seed=0, cache_dir=None)
    rows = [plans.row(row).tolist() for row in range(6)]
    assert sorted(rows[:3]) == [[0, 1], [2, 3], [4, 5]]
    assert sorted(rows[3:]) == [[6, 7], [8, 9], [10, 11]]
    assert plans.plan(0).input_fill == plans.plan(0).target_fill == 1.0
