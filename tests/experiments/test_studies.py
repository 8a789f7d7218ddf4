"""Every study of the project plans and survives JSON; impossible settings are errors before any work."""

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config import from_json, to_json
from common.errors import UserError
from common.report.one_recipe import one_recipe
from common.report.units import si
from experiments.cli.main import main
from experiments.find import OWN, load
from experiments.planning.here import COLUMNS
from experiments.planning.plan import plan
from experiments.study import Study

own = pytest.mark.parametrize("name", OWN)
FOR_A_SLICE = ("xl",)
"""Studies with the mesh of a pod slice, which no test machine has."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)  # compiles and times up to four steps each
        for name in OWN
        if name not in FOR_A_SLICE
    ],
)
def test_every_study_plans(name: str) -> None:
    study, out = load(name), io.StringIO()
    plan(study, Console(file=out, width=1000))
    text = out.getvalue()
    if len(study.arms) > COLUMNS:
        rows = {cells[0]: cells[1:] for line in text.splitlines() if (cells := line.split()) and cells[0] in study.arms}
        assert {name: cells[:2] for name, cells in rows.items()} == {
            name: [*si(run.model.param_count()).split(), f"{run.steps:,}"][:2] for name, run in study.arms.items()
        }
        return
    shown = {cells[1].strip(): cells[2:-1] for line in text.splitlines() if len(cells := line.split("│")) > 2}
    runs = study.arms.values()
    assert [cell.strip() for cell in shown["parameters"]] == [f"{run.model.param_count():,}" for run in runs]
    assert [cell.strip() for cell in shown["FLOPs per step"]] == [f"{run.flops_per_step:.4g}" for run in runs]


@own
def test_arms_that_a_study_compares_share_one_recipe(name: str) -> None:
    """As the certificate requires, apart from the fields that the claim names; and it names none for nothing."""
    study = load(name)
    for claim in study.parity:
        for group in study.groups(claim):
            configs = {arm: to_json(study.arms[arm]) for arm in group}
            check = one_recipe(configs, claim.apart)
            assert check.agrees, check.detail
        assert not claim.apart or not one_recipe({arm: to_json(study.arms[arm]) for arm in study.arms}, ()).agrees


def objects(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths to all JSON objects in `data`."""
    if isinstance(data, dict):
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from objects(value, (*path, key))


def test_either_kind_of_tokenizer_is_printed_and_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("sentencepiece", "byte_pair"):
        assert main(["run", "first_light", "--print-config", f"data.tokenizer.kind={kind}"]) == 0
        study, before = from_json(Study, json.loads(capsys.readouterr().out)), load("first_light")
        for name, run in study.arms.items():
            assert run.data.tokenizer.kind == kind
            assert run.data.tokenizer.vocab_size == before.arms[name].data.tokenizer.vocab_size


@own
def test_json_restores_the_same_study(name: str) -> None:
    study = load(name)
    restored = from_json(Study, json.loads(json.dumps(to_json(study))))
    assert restored == study
    assert [type(run.model) for run in restored.arms.values()] == [type(run.model) for run in study.arms.values()]


@own
def test_a_typo_anywhere_in_json_is_an_error(name: str) -> None:
    data = to_json(load(name))
    first = next(iter(data["arms"]))
    data["arms"] = {first: data["arms"][first]}  # the others have the same fields
    places = [path for path in objects(data) if path != ("arms",) and path[-1:] != ("labels",)]
    assert len(places) > 10
    for path in places:
        changed = copy.deepcopy(data)
        place = changed
        for key in path:
            place = place[key]
        if place.keys() == {"kind"}:  # a variant without fields
            continue
        field = next(key for key in place if key != "kind")
        place[f"{field}z"] = place.pop(field)
        with pytest.raises(UserError, match=f"unknown field '{field}z'.*did you mean '{field}'"):
            from_json(Study, changed)


def test_first_light_is_fair() -> None:
    """Arms have one recipe, and training FLOPs per step within 1 %."""
    study = load("first_light")
    flops = [run.flops_per_step for run in study.arms.values()]
    assert len(flops) == 2 and max(flops) / min(flops) - 1 < 0.01
    assert len({run.model.recipe for run in study.arms.values()}) == 1
    assert {run.model.kind for run in study.arms.values()} == {"gpt", "t5like"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "plan first_light arms.gpt.model.num_kv_heads=4",
            "arms.gpt.model: num_kv_heads is 4: it must divide num_heads (6); nearest: 3",
        ),
        (
            "run first_light arms.t5like.model.head_dim=33",
            "arms.t5like.model: head_dim is 33: RoPE needs an even number; nearest: 34",
        ),
        (
            "plan first_light arms.gpt.model.vocab_size=512",
            "arms.gpt.model.vocab_size is 512, less than .*; nearest: 1024",
        ),
        (
            "plan first_light train.mesh.data=16",
            "train.mesh data=16 needs 16 devices, .* nearest: data=8",
        ),
        ("run first_light train.mesh.data=16", "train.mesh data=16 .* nearest: data=8"),
        ("run first_light arm=gpt train.mesh.fsdp=9", "train.mesh fsdp=9 needs 9 devices"),
        ("plan first_light train.mesh.tensor=4", "train.mesh.tensor is 4, which does not divide .*; nearest: tensor=3"),
        ("run first_light train.mesh.tensor=4", "train.mesh.tensor is 4, which does not divide"),
        ("plan first_light train.mesh.data=3", "data.rows is 8, which does not divide .* (1 x 3 x 1 x 1); nearest: 9"),
        ("run first_light train.mesh.data=3", "data.rows is 8, which does not divide"),
        (
            "plan first_light train.mesh.context=5",
            "data.input_length is 64, which does not divide by train.mesh.context (5); nearest: 65",
        ),
        ("plan first_light train.accumulation=5", "data.rows is 8, .* (1 x 1 x 1 x 5); nearest: 10"),
        ("plan first_light train.mesh.data=0", "arms.t5like.train.mesh: data is 0: it must be 1 or more"),
        (
            "plan first_light train.budget.amount=0",
            "arms.t5like.train.budget: amount is 0.0: it must be more than 0",
        ),
        (
            "plan first_light train.budget.unit=step",
            "arms.t5like.train.budget.unit: unknown value 'step': did you mean 'steps'?",
        ),
        (
            "plan first_light train.schedule.kind=linar",
            "arms.t5like.train.schedule.kind: unknown kind \"linar\": did you mean 'linear'?",
        ),
        ("plan first_light train.seed=one", 'arms.t5like.train.seed: expected int, got "one"'),
        ("plan first_light data.row=8", "unknown field 'row' in arms.t5like.data: did you mean 'rows'?"),
        ("run first_light arm=gtp", "no arm has arm=gtp; there are arm=gpt,t5like"),
        ("plan frist_light", "unknown study 'frist_light': did you mean 'first_light'?"),
    ],
)
def test_impossible_settings_are_one_line(
    command: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    said = captured.err.removeprefix("twinstack: error: ")
    at = 0
    for part in message.split(".*"):
        assert part in said[at:], said
        at = said.index(part, at) + len(part)
    assert list(tmp_path.iterdir()) == []
