"""Mixtures: every stretch keeps the rates, and any example is found without the earlier ones."""

import numpy as np
import pytest

from common.data.mixing import Mixing, rates_by_size
from common.errors import UserError

MIXTURES = [
    Mixing(rates=(1.0,)),
    Mixing(rates=(1.0, 1.0)),
    Mixing(rates=(0.165, 0.165, 0.34, 0.0825, 0.0825, 0.0825, 0.0825), seed=3),
    Mixing(rates=(0.0, 5.0, 0.0, 1e-3, 2.0, 0.0), seed=11),
    Mixing(rates=(1e-7, 1.0), seed=2),
]
mixtures = pytest.mark.parametrize("mixture", MIXTURES, ids=str)


@mixtures
def test_counts_are_those_of_the_examples(mixture: Mixing) -> None:
    component, rank = mixture.take(0, 5000)
    for n in (0, 1, 2, 777, 4999, 5000):
        seen = np.bincount(component[:n], minlength=len(mixture.rates))
        assert mixture.counts(n) == seen.tolist()
    for m in range(len(mixture.rates)):
        assert rank[component == m].tolist() == list(range((component == m).sum()))


@mixtures
@pytest.mark.parametrize("start", [0, 1, 4242, 10**12 + 7])
def test_a_stretch_does_not_depend_on_where_reading_starts(mixture: Mixing, start: int) -> None:
    whole = mixture.take(start, start + 100)
    for begin, end in ((0, 1), (13, 50), (99, 100)):
        for a, b in zip(mixture.take(start + begin, start + end), whole, strict=True):
            assert a.tolist() == b[begin:end].tolist()


@mixtures
def test_examples_are_found_in_any_order(mixture: Mixing) -> None:
    numbers = np.array([7, 123_456, 0, 5000, 7, 123_455, 4096, 4095])
    component, rank = mixture.find(numbers)
    for n, m, k in zip(numbers.tolist(), component.tolist(), rank.tolist(), strict=True):
        assert [[m], [k]] == [a.tolist() for a in mixture.take(n, n + 1)]


@mixtures
def test_rates_are_kept_in_every_stretch(mixture: Mixing) -> None:
    shares = np.array(mixture.rates) / sum(mixture.rates)
    for start in (0, 12_345, 10**9):
        for length in (64, 1000, 100_000):
            before, after = (np.array(mixture.counts(n)) for n in (start, start + length))
            assert np.abs(after - before - length * shares).max() < 6
    assert (np.array(mixture.counts(10**6))[shares == 0] == 0).all()


def test_seeds_give_different_mixtures() -> None:
    first, other = (Mixing(rates=(1.0, 1.0), seed=seed).take(0, 64)[0].tolist() for seed in (0, 1))
    assert first != other


@pytest.mark.parametrize(
    ("sizes", "how", "rates"),
    [
        ([1, 3], {}, (0.25, 0.75)),
        ([10, 1000, 10**9], {"cap": 1000}, (10 / 2010, 1000 / 2010, 1000 / 2010)),
        ([100, 400, 0], {"temperature": 2.0}, (1 / 3, 2 / 3, 0.0)),
        ([1, 10**12], {"temperature": 1e9}, (0.5, 0.5)),
    ],
)
def test_rates_by_size(sizes: list[int], how: dict[str, float], rates: tuple[float, ...]) -> None:
    np.testing.assert_allclose(rates_by_size(sizes, **how), rates, rtol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("rates", [(), (0.0, 0.0), (1.0, -1.0), (float("nan"),), (float("inf"),)])
def test_mixtures_without_a_positive_rate_are_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="mixture of nothing|it must be"):
        Mixing(rates=rates)


@pytest.mark.parametrize("sizes", [[], [0]])
def test_sizes_without_a_positive_one_are_refused(sizes: list[int]) -> None:
    with pytest.raises(UserError):
        rates_by_size(sizes)
