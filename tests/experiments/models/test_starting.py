"""Runs that start from another run or from a model folder, in Python and from the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import apply_overrides
from common.errors import UserError
from common.files import read_json
from common.train.loop import Fitted
from common.train.run_files import RunFiles
from common.trees import flatten
from experiments.cli.main import main
from experiments.config import Experiment
from experiments.models.initial import check_initial
from experiments.running.pipeline import open_data, train_arm
from tests.experiments.models.opening import opened
from tests.tiny import Observer


def beginning(experiment: Experiment, path: Any, *overrides: str) -> Experiment:
    return apply_overrides(experiment, [f"arms.gpt.init.path={json.dumps(str(path))}", *overrides])


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_an_arm_starts_from_a_model(
    experiment: Experiment, run_dir: tuple[Path, Fitted], model_folder: Path, kind: str, tmp_path: Path
) -> None:
    source = {"run": run_dir[0] / "gpt", "folder": model_folder}[kind]
    rule = 'arms.gpt.init.rules=[{"kind": "fresh", "leaves": "output.*"}]'
    short = beginning(experiment, source, rule, "train.budget.amount=1", "train.optimizer.weight_decay=0")
    short = apply_overrides(short, ["arms.gpt.learning_rate=1e-30"])
    watcher = Observer()
    fitted = train_arm(short, "gpt", open_data(short), tmp_path, watcher)
    expected = opened(source).params
    for name, leaf in flatten(fitted.params).items():
        assert np.array_equal(leaf, flatten(expected)[name]) == (name != "output.weight_DV"), name
    config = read_json(tmp_path / "gpt" / RunFiles.CONFIG)
    assert config["init"]["path"] == str(source) and config["init"]["rules"][0]["leaves"] == "output.*"
    assert "fresh: output.weight_DV" in watcher.notes[0]


def test_a_model_that_does_not_fit_is_an_error_before_anything_is_written(
    experiment: Experiment, run_dir: tuple[Path, Fitted], tmp_path: Path
) -> None:
    source = run_dir[0] / "gpt"
    wide = beginning(experiment, source, "arms.gpt.model.d_ff=48")
    with pytest.raises(UserError, match=r"in_DF: \[1, 16, 48\] here, \[1, 16, 32\] there"):
        check_initial(wide, tmp_path)
    assert check_initial(beginning(experiment, source), tmp_path) == []
    other = beginning(experiment, source, "arms.gpt.model.recipe.norm_epsilon=0.5")
    assert check_initial(other, None) == [f"gpt: not as in {source}@4: recipe.norm_epsilon: 1e-06 -> 0.5"]
    # An arm that has checkpoints resumes from them and does not open the other model.
    assert check_initial(beginning(experiment, tmp_path / "gone"), run_dir[0]) == []


@pytest.mark.parametrize(
    ("command", "paths"),
    [
        ("train tiny --arm gpt --init-from {run}", {"gpt": "{run}/gpt", "t5like": None}),
        ("train tiny --arm gpt --init-from {run}@2", {"gpt": "{run}/gpt@2", "t5like": None}),
        ("train tiny --arm t5like --init-from models/small", {"gpt": None, "t5like": "models/small"}),
        ("compare tiny --init-from {run}", {"gpt": "{run}/gpt", "t5like": "{run}"}),
        ("compare tiny arms.gpt.init.path=there", {"gpt": "there", "t5like": None}),
    ],
)
def test_init_from_on_the_command_line(
    experiment: Experiment,
    run_dir: tuple[Path, Fitted],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    paths: dict[str, str | None],
) -> None:
    made: list[Experiment] = []
    monkeypatch.setattr("experiments.registry.EXPERIMENTS", {"tiny": experiment.question})
    monkeypatch.setattr("experiments.registry.load", lambda name: experiment)
    monkeypatch.setattr("experiments.running.comparison.train", lambda experiment, *_, **__: made.append(experiment))
    monkeypatch.setattr("experiments.running.comparison.compare", lambda experiment, *_, **__: made.append(experiment))
    assert main(command.format(run=run_dir[0]).split()) == 0
    found = {name: arm.init.path if arm.init else None for name, arm in made[0].arms.items()}
    assert found == {name: path and path.format(run=run_dir[0]) for name, path in paths.items()}
