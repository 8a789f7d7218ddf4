"""Runs that start from another run or from a model folder, in Python and from the command line."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import apply_overrides
from common.errors import UserError
from common.files import read_json
from common.train.config import AdamW, Budget, InitFrom
from common.train.loop import Fitted
from common.train.run_files import RunFiles
from common.trees import flatten
from experiments.cli.main import main
from experiments.models.initial import check_initial, initial_content
from experiments.run import Run
from experiments.running.study_folder import StudyFolder
from experiments.study import Study
from tests.experiments.models.opening import opened
from tests.experiments.tiny_study import train_run, with_train
from tests.tiny import Observer


def beginning(study: Study, path: Any, *overrides: str) -> Run:
    return apply_overrides(study, [f"arms.gpt.init.path={json.dumps(str(path))}", *overrides]).arms["gpt"]


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_an_arm_starts_from_a_model(
    study: Study, run_dir: tuple[Path, Fitted], model_folder: Path, kind: str, tmp_path: Path
) -> None:
    source = {"run": run_dir[0] / "gpt", "folder": model_folder}[kind]
    rule = 'arms.gpt.init.rules=[{"kind": "fresh", "leaves": "output.*"}]'
    short = beginning(study, source, rule, "arms.gpt.learning_rate=1e-30")
    short = with_train(short, budget=Budget(unit="steps", amount=1), optimizer=AdamW(weight_decay=0.0))
    watcher = Observer()
    fitted = train_run(short, "gpt", tmp_path, watcher)
    expected = opened(source).params
    for name, leaf in flatten(fitted.params).items():
        assert np.array_equal(leaf, flatten(expected)[name]) == (name != "output.weight_DV"), name
    config = read_json(tmp_path / RunFiles.CONFIG)
    assert config["init"]["path"] == str(source) and config["init"]["rules"][0]["leaves"] == "output.*"
    assert "fresh: output.weight_DV" in watcher.notes[0]


def test_a_model_that_does_not_fit_is_an_error_before_anything_is_written(
    study: Study, run_dir: tuple[Path, Fitted], tmp_path: Path
) -> None:
    source = run_dir[0] / "gpt"
    wide = beginning(study, source, "arms.gpt.model.d_ff=48")
    with pytest.raises(UserError, match=r"in_DF: \[1, 16, 48\] here, \[1, 16, 32\] there"):
        check_initial("gpt", wide, tmp_path)
    assert check_initial("gpt", beginning(study, source), tmp_path) == []
    other = beginning(study, source, "arms.gpt.model.recipe.norm_epsilon=0.5")
    assert check_initial("gpt", other, None) == [f"gpt: not as in {source}@4: recipe.norm_epsilon: 1e-06 -> 0.5"]
    # An arm that has checkpoints resumes from them and does not open the other model.
    assert check_initial("gpt", beginning(study, tmp_path / "gone"), run_dir[0] / "gpt") == []


def test_a_hash_of_the_weights_that_a_run_starts_from(run_dir: tuple[Path, Fitted], tmp_path: Path) -> None:
    """It is of the newest checkpoint, or the named one, wherever the run is."""
    source = shutil.copytree(run_dir[0] / "gpt", tmp_path / "source")
    newest, last, earlier = (
        initial_content(InitFrom(path=path), tmp_path / "new") for path in (str(source), f"{source}@4", f"{source}@2")
    )
    assert newest == last != earlier
    assert newest == initial_content(InitFrom(path=str(run_dir[0] / "gpt")), tmp_path / "new")
    shutil.rmtree(source / RunFiles.CHECKPOINTS / "4")
    assert initial_content(InitFrom(path=str(source)), tmp_path / "new") == earlier


@pytest.mark.parametrize(
    ("command", "paths"),
    [
        ("run tiny arm=gpt --init-from {run}", {"gpt": "{run}/gpt"}),
        ("run tiny --init-from {run}@2", {"gpt": "{run}/gpt@2", "t5like": "{run}@2"}),
        ("run tiny --init-from models/small", {"gpt": "models/small", "t5like": "models/small"}),
        ("run tiny arms.gpt.init.path=there", {"gpt": "there", "t5like": None}),
    ],
)
def test_init_from_on_the_command_line(
    study: Study,
    run_dir: tuple[Path, Fitted],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    paths: dict[str, str | None],
) -> None:
    made: list[Study] = []

    def run_study(folder: StudyFolder, arms: Sequence[str], *, profile_steps: int) -> int:
        made.append(dataclasses.replace(folder.study, arms={name: folder.study.arms[name] for name in arms}))
        return 0

    monkeypatch.setattr("experiments.find.OWN", ("tiny",))
    monkeypatch.setattr("experiments.find.load", lambda name: study)
    monkeypatch.setattr("experiments.running.study_run.run_study", run_study)
    assert main(command.format(run=run_dir[0]).split()) == 0
    found = {name: arm.init.path if arm.init else None for name, arm in made[0].arms.items()}
    assert found == {name: path and path.format(run=run_dir[0]) for name, path in paths.items()}
