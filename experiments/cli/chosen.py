"""The experiment that a command line names, with its overrides."""

import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from common.config import apply_overrides, to_json
from common.errors import UserError, nearest
from common.paths import check_folder, user_path
from common.terminal import harmless
from common.train.run_files import RunFiles
from experiments import registry
from experiments.cli.arguments import RUNS
from experiments.config import Experiment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    experiment: Experiment
    """With all overrides applied."""
    overrides: tuple[str, ...]
    """The command line's overrides, then those that `--match` adds: what a launched job needs."""


def choose(
    name: str,
    overrides: Sequence[str],
    *,
    arm: str | None = None,
    match: str | None = None,
    init_from: str | None = None,
) -> Chosen:
    """Loads an experiment and applies `--init-from`, the overrides and `--match`, in this order.

    Raises UserError for an unknown arm, and as `apply_overrides` and `Experiment.matching` do.
    """
    experiment = registry.load(name)
    if arm is not None and arm not in experiment.arms:
        raise UserError(f"unknown arm {arm!r}: {nearest(arm, experiment.arms)}")
    arms = experiment.arms if arm is None else [arm]
    initial = [] if init_from is None else _initial_models(init_from, arms)
    experiment = apply_overrides(experiment, [*initial, *overrides])
    widths = [] if match is None else experiment.matching(match)
    if match is not None:
        print(harmless(f"--match {match}: {' '.join(widths) or 'all arms do'}"), file=sys.stderr)
        experiment = apply_overrides(experiment, widths)
    return Chosen(experiment=experiment, overrides=(*overrides, *widths))


def print_resolved(experiment: Experiment) -> None:
    """Prints the config as JSON, for `--print-config`."""
    print(harmless(json.dumps(to_json(experiment), indent=2, ensure_ascii=False)))


def run_directory(name: str, run_dir: Path | None) -> Path:
    """Returns where the results go. Raises UserError where no folder can be made."""
    chosen = RUNS / name if run_dir is None else run_dir
    check_folder(chosen, "--run-dir")
    return chosen


def _initial_models(model: str, arms: Iterable[str]) -> list[str]:
    """`--init-from` as overrides of these arms."""
    return [f"arms.{arm}.init.path={json.dumps(_initial_model(model, arm))}" for arm in arms]


def _initial_model(model: str, arm: str) -> str:
    """The arm's own run directory where `model` is a whole comparison's (`DIR` or `DIR@STEP`); else `model` itself."""
    run_dir = re.sub(r"@\d+$", "", model)
    own = f"{Path(run_dir) / arm}{model.removeprefix(run_dir)}"
    return own if (user_path(run_dir) / arm / RunFiles.CONFIG).is_file() else model
