"""All requested splits are scored, under distinct names, and searched for in the training data."""

import dataclasses
import json
from pathlib import Path

import pytest

from common.data.sources.config import ByRate, SourceConfig, SourceMixture
from common.errors import UserError
from experiments.run import Run
from experiments.running.pipeline import open_data
from experiments.running.scored_splits import ScoredSplit, open_tests
from tests.experiments.tiny_study import tiny_run, with_data, with_evaluation, write_data


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    write_data(tmp_path)
    monkeypatch.setenv("TWINSTACK_CACHE", str(tmp_path / "cache"))
    return tiny_run(tmp_path)


def opened(run: Run) -> dict[str, ScoredSplit]:
    return open_tests(run, open_data("gpt", run).tokenizer)


def test_every_part_of_a_mixture_is_scored(run: Run) -> None:
    """Also where parts have the same source."""
    there = run.data.source
    assert isinstance(there, SourceConfig)
    back = dataclasses.replace(there, inputs="reversed", targets="en")
    mixed = with_data(run, source=SourceMixture(parts=(there, back), by=ByRate(rates=(1.0, 1.0))))
    tests = opened(mixed)
    assert list(tests) == [f"validation of {there.name} (part {number})" for number in (1, 2)]
    one, other = ([(t["inputs"], t["targets"]) for t in test.texts()] for test in tests.values())
    assert len(one) == mixed.evaluation.examples and one == [(y, x) for x, y in other] != other


def test_scored_texts_in_the_training_data_are_counted(run: Run, tmp_path: Path) -> None:
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    new = {"en": "one two three four five six", "reversed": "six five four three two one"}
    rows = [*train[:3], train[5] | {"reversed": "ten ten ten ten ten ten"}, new]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (test,) = opened(with_evaluation(run, splits=("test",))).values()
    found = test.in_training
    assert (found.examples, found.inputs, found.targets, found.both, found.complete) == (5, 4, 3, 3, True)


def test_a_group_called_all_is_an_error_before_training(run: Run, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    kinds = ["short"] * (len(rows) - 1) + ["all"]
    lines = [json.dumps(row | {"kind": kind}) + "\n" for row, kind in zip(rows, kinds, strict=True)]
    (tmp_path / "validation.jsonl").write_text("".join(lines))
    train = [json.loads(line) | {"kind": "x"} for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    assert isinstance(run.data.source, SourceConfig)
    grouped = with_data(run, source=dataclasses.replace(run.data.source, group="kind"))
    with pytest.raises(UserError, match="split 'validation': a group may not be called 'all'"):
        opened(grouped)
