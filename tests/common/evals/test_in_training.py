"""Compares counts of test texts in training data with counts by sets of tuples."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from common.data.ragged import Ragged
from common.data.tokenized.token_store import TokenStream
from common.evals import in_training
from common.evals.in_training import count_in_training
from common.evals.measure import InTraining

Texts = list[tuple[int, ...]]
UNKNOWN = 2


def texts(dice: random.Random, count: int) -> Texts:
    """Makes short texts over few tokens: many occur twice, some are empty, some are prefixes of others."""
    return [tuple(dice.choices((UNKNOWN, 3, 4, 5), (1, 5, 5, 5), k=dice.randint(0, 4))) for _ in range(count)]


def stream(records: Texts, shards: int = 1) -> TokenStream:
    cuts = np.linspace(0, len(records), shards + 1).astype(int)
    return TokenStream(tuple(Ragged.of(records[a:b]) for a, b in itertools.pairwise(cuts)))


def by_sets(train: list[tuple[Texts, Texts]], inputs: Texts, targets: Texts) -> tuple[int, int, int]:
    known = (
        {x for one, _ in train for x in one},
        {y for _, other in train for y in other},
        {pair for part in train for pair in zip(*part, strict=True)},
    )
    fit = [bool(x) and UNKNOWN not in x for x in inputs], [bool(y) and UNKNOWN not in y for y in targets]
    return (
        sum(x in known[0] and good for x, good in zip(inputs, fit[0], strict=True)),
        sum(y in known[1] and good for y, good in zip(targets, fit[1], strict=True)),
        sum((x, y) in known[2] and a and b for x, y, a, b in zip(inputs, targets, *fit, strict=True)),
    )


@pytest.mark.parametrize("seed", range(4))
def test_counts_equal_those_by_sets(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)
    train = [(texts(dice, count), texts(dice, count)) for count in (40, 25)]
    inputs, targets = (train[0][side][:15] + texts(dice, 45) for side in (0, 1))
    monkeypatch.setattr(in_training, "RECORDS_TOGETHER", 7)
    found = count_in_training(
        [{"inputs": stream(one, 3), "targets": stream(other, 3)} for one, other in train],
        {"inputs": stream(inputs), "targets": stream(targets)},
        np.arange(60),
        UNKNOWN,
    )
    assert (found.inputs, found.targets, found.both) == by_sets(train, inputs, targets)
    assert 0 < found.both < found.inputs < 60 and found.complete


def test_only_chosen_records_are_counted_and_a_partial_search_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"inputs": stream([(3,), (4,), (5,)]), "targets": stream([(3,), (4,), (5,)])}
    test = {"inputs": stream([(5,), (9,), (3,)]), "targets": stream([(9,), (9,), (3,)])}
    found = count_in_training([train], test, np.array([0, 1]), UNKNOWN)
    assert found == InTraining(examples=2, inputs=1, targets=0, both=0, complete=True)
    assert "the inputs of 1, the targets of 0" in found.sentence("test")
    monkeypatch.setattr(in_training, "RECORDS_TOGETHER", 1)
    monkeypatch.setattr(in_training, "SEARCHED_TOKENS", 2)
    found = count_in_training([train], test, np.arange(3), UNKNOWN)
    assert found == InTraining(examples=3, inputs=1, targets=1, both=1, complete=False)
    assert "the first part of the training data holds" in found.sentence("test")


def test_texts_are_equal_whatever_the_width_of_their_ids(tmp_path: Path) -> None:
    """Tokens on disk take two bytes if they fit."""
    wide = stream([(3, 70), (4, 5)])
    narrow = TokenStream((Ragged(tokens_P=np.array([4, 5], np.uint16), offsets=np.array([0, 2])),))
    found = count_in_training(
        [{"inputs": narrow, "targets": narrow}], {"inputs": wide, "targets": wide}, np.arange(2), 2
    )
    assert (found.inputs, found.both) == (1, 1)
