"""Every registered experiment loads, plans and survives JSON; impossible settings are errors before any work."""

import copy
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from common.config import from_json, to_json
from common.errors import UserError
from common.files import read_json, write_rows
from common.report.certificate import certify_run, one_recipe
from common.report.results import ArmResult
from common.report.run_files import read_run
from common.train import run_dir as rd
from common.train.programs import Setup
from common.train.run_files import RunFiles
from experiments.cli.main import main
from experiments.config import Experiment
from experiments.planning.plan import plan
from experiments.registry import EXPERIMENTS, load
from experiments.running import comparison, scoring
from experiments.running.audit import StepCount, count_step
from experiments.running.comparison import compare, report, train
from experiments.running.pipeline import open_data
from tests.experiments.tiny_experiment import STEPS, tiny_experiment, write_data

registered = pytest.mark.parametrize("name", EXPERIMENTS)
FOR_A_SLICE = ("xl",)
"""Experiments with the mesh of a pod slice, which no test machine has."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "first_light" else pytest.mark.slow)
        for name in EXPERIMENTS
        if name not in FOR_A_SLICE
    ],
)
def test_every_experiment_plans(name: str) -> None:
    experiment, out = load(name), io.StringIO()
    plan(experiment, Console(file=out, width=240))
    text = out.getvalue()
    shown = {cells[1].strip(): cells[2:-1] for line in text.splitlines() if len(cells := line.split("│")) > 2}
    arms = experiment.arms.values()
    assert [cell.strip() for cell in shown["parameters"]] == [f"{arm.model.param_count():,}" for arm in arms]
    assert [cell.strip() for cell in shown["FLOPs per step"]] == [
        f"{experiment.flops_per_step(arm):.4g}" for arm in arms
    ]
    assert json.loads(text[text.index("\n{") :]) == to_json(experiment)


@registered
def test_arms_of_every_experiment_share_one_recipe(name: str) -> None:
    """As the certificate requires, apart from the fields in `varies`."""
    experiment = load(name)
    resolved = to_json(experiment)
    configs = {arm: {**config, "train": resolved["train"]} for arm, config in resolved["arms"].items()}
    check = one_recipe(configs, experiment.varies)
    assert check.agrees, check.detail
    assert not experiment.varies or not one_recipe(configs, ()).agrees


def objects(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the paths to all JSON objects in `data`."""
    if isinstance(data, dict):
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from objects(value, (*path, key))


def test_either_kind_of_tokenizer_is_printed_and_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("sentencepiece", "byte_pair"):
        assert main(["compare", "first_light", "--print-config", f"data.tokenizer.kind={kind}"]) == 0
        experiment = from_json(Experiment, json.loads(capsys.readouterr().out))
        assert experiment.data.tokenizer.kind == kind
        assert experiment.data.tokenizer.vocab_size == load("first_light").data.tokenizer.vocab_size


@registered
def test_json_restores_the_same_experiment(name: str) -> None:
    experiment = load(name)
    data = json.loads(json.dumps(to_json(experiment)))
    restored = from_json(Experiment, data)
    assert restored == experiment
    assert [type(arm.model) for arm in restored.arms.values()] == [type(arm.model) for arm in experiment.arms.values()]


@registered
def test_a_typo_anywhere_in_json_is_an_error(name: str) -> None:
    data = to_json(load(name))
    places = [path for path in objects(data) if path not in (("arms",),)]
    assert len(places) > 10
    for path in places:
        changed = copy.deepcopy(data)
        place = changed
        for key in path:
            place = place[key]
        field = next(key for key in place if key != "kind")
        place[f"{field}z"] = place.pop(field)
        with pytest.raises(UserError, match=f"unknown field '{field}z'.*did you mean '{field}'"):
            from_json(Experiment, changed)


def test_first_light_is_fair() -> None:
    """Arms have one recipe, and training FLOPs per step within 1 %."""
    experiment = load("first_light")
    flops = [experiment.flops_per_step(arm) for arm in experiment.arms.values()]
    assert len(flops) == 2 and max(flops) / min(flops) - 1 < 0.01
    assert len({arm.model.recipe for arm in experiment.arms.values()}) == 1
    assert {arm.model.kind for arm in experiment.arms.values()} == {"gpt", "t5like"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "plan first_light arms.gpt.model.num_kv_heads=4",
            "arms.gpt.model: num_kv_heads is 4: it must divide num_heads (6); nearest: 3",
        ),
        (
            "compare first_light arms.t5like.model.head_dim=33",
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
        ("compare first_light train.mesh.data=16", "train.mesh data=16 .* nearest: data=8"),
        ("train first_light --arm gpt train.mesh.fsdp=9", "train.mesh fsdp=9 needs 9 devices"),
        ("plan first_light train.mesh.tensor=4", "train.mesh.tensor is 4, which does not divide .*; nearest: tensor=3"),
        ("compare first_light train.mesh.tensor=4", "train.mesh.tensor is 4, which does not divide"),
        ("plan first_light train.mesh.data=3", "data.rows is 8, which does not divide .* (1 x 3 x 1 x 1); nearest: 9"),
        ("compare first_light train.mesh.data=3", "data.rows is 8, which does not divide"),
        (
            "plan first_light train.mesh.context=5",
            "data.input_length is 64, which does not divide by train.mesh.context (5); nearest: 65",
        ),
        ("plan first_light train.accumulation=5", "data.rows is 8, .* (1 x 1 x 1 x 5); nearest: 10"),
        ("plan first_light train.mesh.data=0", "train.mesh: data is 0: it must be 1 or more"),
        (
            "plan first_light train.budget.amount=0",
            "train.budget: amount is 0.0: it must be more than 0",
        ),
        ("plan first_light train.budget.unit=step", "train.budget.unit: unknown value 'step': did you mean 'steps'?"),
        (
            "plan first_light train.schedule.kind=linar",
            "train.schedule.kind: unknown kind \"linar\": did you mean 'linear'?",
        ),
        ("plan first_light train.seed=one", 'train.seed: expected int, got "one"'),
        ("plan first_light data.row=8", "unknown field 'row' in data: did you mean 'rows'?"),
        ("train first_light --arm gtp", "unknown arm 'gtp': did you mean 'gpt'? Valid: gpt, t5like"),
        ("plan frist_light", "unknown experiment 'frist_light': did you mean 'first_light'?"),
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


def test_compare_local_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole path from the user's own files to the report."""
    write_data(tmp_path)
    experiment, run_dir = tiny_experiment(tmp_path), tmp_path / "run"
    before_the_audit = []

    def noted(setup: Setup) -> StepCount:
        """Stands for an audit that uses up all memory and ends the process."""
        before_the_audit.append(read_json(run_dir / setup.model.kind / "result.json"))
        return count_step(setup)

    monkeypatch.setattr(scoring, "count_step", noted)
    compare(experiment, run_dir)
    run = read_run(run_dir)
    for whole, result in zip(before_the_audit, run.results, strict=True):
        found = from_json(ArmResult, whole)
        assert found.xla_flops_per_step is None and "ended before" in found.why_not_counted
        counted = {"xla_flops_per_step": result.xla_flops_per_step, "why_not_counted": ""}
        assert dataclasses.replace(found, **counted) == result
    assert [arm.name for arm in run.arms] == ["gpt", "t5like"]
    for arm in run.arms:
        assert arm.result.steps == STEPS == len(arm.metrics)
        assert arm.result.validation_loss == arm.metrics[-1].validation_loss
        assert arm.result.flops.full_attention == arm.metrics[-1].flops
        assert len(arm.samples) == experiment.evaluation.examples == arm.result.scores[0].examples
        assert 0 < arm.result.target_fill <= 1 and arm.result.flops.useful_full_attention > 0
    assert run.results[0].fingerprint == run.results[1].fingerprint
    checks = {check.name: check.agrees for check in certify_run(run).checks}
    assert [checks[name] for name in ("same data in the same order", "same steps, examples and tokens")] == [True, True]
    assert checks["ledger = XLA within 2 %"] and not checks["training FLOPs within 1 %"]  # these two are not matched
    out = capsys.readouterr().out
    assert "train.seed 0 decides the first weights and dropout, data.seed 0 the order" in out
    for name in ("gpt", "t5like"):  # without a terminal
        steps = [f"{name}: {step}" for step in ("compiling", "decoding 8 examples of validation", "counting")]
        assert all(step in out for step in steps)
    assert (
        "validation: of 8 examples, the training data hold" in out and "<svg" in (run_dir / "report.html").read_text()
    )
    changed = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, seed=1))
    with pytest.raises(UserError, match="another config of tiny .train.seed: 0 -> 1."):
        compare(changed, run_dir)
    check_finished_work_is_skipped(experiment, run_dir, capsys, monkeypatch)
    a_lone_arm_is_scored_and_reported(experiment, run_dir, capsys)


def test_each_seed_changes_only_its_part(tmp_path: Path) -> None:
    """data.seed changes the batches, train.seed does not; README's recipe for another seed changes both."""
    write_data(tmp_path)
    experiment = tiny_experiment(tmp_path)
    of_training = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, seed=1))
    of_data = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, seed=1))
    first, same, other = (open_data(e).train.batch(0).fingerprint for e in (experiment, of_training, of_data))
    assert first == same != other
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    recipes = [line.split() for line in readme.splitlines() if line.strip().startswith("twinstack") and "seed=" in line]
    assert recipes and all({"train.seed=1", "data.seed=1"} <= set(words) for words in recipes)


def a_lone_arm_is_scored_and_reported(
    experiment: Experiment, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_dir / "t5like")
    train(experiment, "gpt", run_dir)
    shown = capsys.readouterr().out
    assert "exact match, validation" in shown and "validation: all" in shown
    report(run_dir)
    assert "without t5like, not trained and scored yet: the run's command with --arm" in capsys.readouterr().err


def check_finished_work_is_skipped(
    experiment: Experiment, run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also checks that incomplete results, and those of another config, are made again."""
    files = {path: path.read_bytes() for path in run_dir.rglob("*.json*")}
    page = (run_dir / "report.html").read_bytes()

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("work")

    for work in ("pipeline.fit", "scoring.greedy_decoder", "scoring.count_step"):
        monkeypatch.setattr(f"experiments.running.{work}", refuse)
    (run_dir / "report.html").unlink()
    compare(experiment, run_dir)
    assert (run_dir / "report.html").read_bytes() == page
    assert "gpt: trained and scored already" in capsys.readouterr().out
    rows = (run_dir / "gpt" / "samples.jsonl").read_bytes().splitlines(keepends=True)
    result = json.loads((run_dir / "gpt" / "result.json").read_text())
    for name, content in (
        ("samples.jsonl", b"".join(rows[:-1])),
        ("metrics.jsonl", b""),
        ("result.json", json.dumps(result | {"made_from": "0"}).encode()),
        ("result.json", json.dumps(result | {"steps": 39}).encode()),
        ("result.json", b"{"),
    ):
        path = run_dir / "gpt" / name
        path.write_bytes(content)
        with pytest.raises(AssertionError, match="work"):
            compare(experiment, run_dir)
        path.write_bytes(files[path])
    other = dataclasses.replace(experiment, evaluation=dataclasses.replace(experiment.evaluation, examples=4))
    with pytest.raises(AssertionError, match="work"):  # scored again, and no error about another run
        compare(other, run_dir)
    check_additions_train_nothing_again(experiment, run_dir, capsys)
    compare(experiment, run_dir)


def check_additions_train_nothing_again(
    experiment: Experiment, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other prose, other validation and saves, a further arm, and fields that today's version did not know yet."""
    capsys.readouterr()
    reworded = {name: dataclasses.replace(arm, about="Another sentence.") for name, arm in experiment.arms.items()}
    watched = dataclasses.replace(experiment.train, validate_every=7, checkpoint_every=3, keep_last=5)
    added = {**reworded, "third": dataclasses.replace(experiment.arms["gpt"], learning_rate=1e-3)}
    changed = dataclasses.replace(experiment, expected="Something else.", train=watched, arms=added)
    for name in ("gpt", "t5like"):
        path = run_dir / name / RunFiles.CONFIG
        stored = json.loads(path.read_text())
        del stored["about"], stored["train"]["anomalies"], stored["model"]["recipe"]["dropout"]
        path.write_text(json.dumps(stored))
    with pytest.raises(AssertionError, match="work"):  # the arm that is new
        compare(changed, run_dir)
    shown = capsys.readouterr().out
    assert "gpt: trained and scored already" in shown and "t5like: trained and scored already" in shown
    config = json.loads((run_dir / "gpt" / RunFiles.CONFIG).read_text())
    assert config == {"schema_version": 1, **to_json(experiment.run_config("gpt")), "about": "Another sentence."}


def test_a_command_that_fails_before_training_does_not_claim_the_directory(tmp_path: Path) -> None:
    """The corrected command may use the same directory; after a trained step, another config may not."""
    write_data(tmp_path)
    experiment, run_dir = tiny_experiment(tmp_path), tmp_path / "run"
    other = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, seed=1))
    wrong = dataclasses.replace(other, evaluation=dataclasses.replace(experiment.evaluation, splits=("tset",)))
    with pytest.raises(UserError, match="tset"):
        compare(wrong, run_dir)
    assert not run_dir.exists()
    comparison._claim(wrong, run_dir)
    rd.claim(run_dir / "gpt", to_json(wrong.run_config("gpt")), {}, {})
    comparison._begin(experiment, run_dir, ["gpt"])
    write_rows(run_dir / "gpt" / RunFiles.METRICS, [{"step": 1}])
    with pytest.raises(UserError, match="another config of tiny .train.seed: 1 -> 0."):
        comparison._begin(experiment, run_dir, ["gpt"])
    (run_dir / "gpt" / RunFiles.CONFIG).write_text("null")
    with pytest.raises(UserError, match="config.json does not hold a JSON object"):
        comparison._begin(experiment, run_dir, ["gpt"])
