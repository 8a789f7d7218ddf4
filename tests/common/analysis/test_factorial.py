import itertools

import numpy as np
import pytest

from common.analysis.factorial import Contrast, contrasts, split_by
from common.analysis.seeds import compare_seeds

NAMES = ("a", "b", "c")


def grid(seeds: int, noise: float = 0.0, **coefficients: float) -> dict[tuple[int, ...], dict[int, float]]:
    """Values of sum of coefficient x product of codes (-1, +1), plus noise of each cell and a shift of each seed."""
    rng = np.random.default_rng(0)
    shift = rng.normal(0, 1, seeds)
    cells = {}
    for cell in itertools.product((0, 1), repeat=len(NAMES)):
        code = dict(zip(NAMES, (2 * level - 1 for level in cell), strict=True))
        value = sum(weight * np.prod([code[name] for name in term]) for term, weight in coefficients.items())
        cells[cell] = {seed: value + shift[seed] + noise * rng.normal() for seed in range(seeds)}
    return cells


def effect(cells, *factors: str) -> float:
    first, second = split_by(Contrast(factors=factors), NAMES, cells)
    return compare_seeds(first, second).difference.value


def test_effects_are_twice_the_coefficients_of_the_regression():
    cells = grid(3, a=0.5, b=-1.0, ab=0.25, abc=3.0)
    wanted = {("a",): 1.0, ("b",): -2.0, ("c",): 0.0, ("a", "b"): 0.5, ("a", "c"): 0.0, ("b", "c"): 0.0}
    for factors, value in wanted.items():
        assert effect(cells, *factors) == pytest.approx(value, abs=1e-12)


def test_effects_agree_with_least_squares_on_noisy_cells():
    cells = grid(5, noise=1.0, a=0.3, bc=0.2)
    rows, y = [], []
    for cell, by_seed in cells.items():
        code = [2 * level - 1 for level in cell]
        terms = [np.prod([code[NAMES.index(name)] for name in c.factors]) for c in contrasts(NAMES)]
        rows += [[1, *terms]] * len(by_seed)
        y += list(by_seed.values())
    fitted, *_ = np.linalg.lstsq(np.array(rows, float), np.array(y), rcond=None)
    found = [effect(cells, *contrast.factors) for contrast in contrasts(NAMES)]
    np.testing.assert_allclose(found, 2 * fitted[1:], atol=1e-12)


def test_what_seeds_share_does_not_widen_an_effect():
    first, second = split_by(Contrast(factors=("a",)), NAMES, grid(5, a=0.5))
    difference = compare_seeds(first, second).difference
    assert difference.high - difference.low == pytest.approx(0, abs=1e-12)


def test_only_seeds_that_every_cell_has_take_part():
    cells = grid(3, a=0.5)
    del cells[0, 1, 0][2]
    first, second = split_by(Contrast(factors=("a",)), NAMES, cells)
    assert list(first) == list(second) == [0, 1]


def test_a_missing_cell_is_an_error():
    cells = grid(3, a=0.5)
    del cells[0, 1, 0]
    with pytest.raises(ValueError, match=r"7 cells of 8; missing: \[\(0, 1, 0\)\]"):
        split_by(Contrast(factors=("a",)), NAMES, cells)
