"""The study that a command line names, with its overrides.

seeds=5                        a field of the study
train.seed=1                   a field of every arm
arms.gpt*.learning_rate=1e-3   a field of the arms whose names match
family=gpt                     selects the arms with this label; several values: family=gpt,t5like
run=gpt-s1                     selects the runs of this name, and those that they start from
"""

import dataclasses
import fnmatch
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.config import apply_overrides, from_earlier_json, from_json, to_json
from common.config_types import field_types
from common.errors import UserError, nearest
from common.files import read_object
from common.paths import check_folder, user_path
from common.terminal import harmless
from common.train.run_files import RunFiles
from experiments import find
from experiments.cli.arguments import RUNS
from experiments.run import Run
from experiments.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    study: Study
    """With all overrides applied."""
    arms: tuple[str, ...]
    """The selected arms, and those that they start from; without a selection, all."""
    runs: tuple[str, ...] = ()
    """Patterns of the names of the selected runs; without a selection, none."""
    overrides: tuple[str, ...]
    """The command line's overrides and selections, then what `--match` and `--init-from` add."""

    @property
    def selected(self) -> Study:
        """The study with the selected arms only."""
        return self.study.only(self.arms)


def choose(
    name: str,
    overrides: Sequence[str],
    *,
    config: Path | None = None,
    match: str | None = None,
    init_from: str | None = None,
) -> Chosen:
    """Loads a study and applies `--init-from`, the overrides and `--match`, in this order.

    Args:
      config: a file with what `--print-config` printed, to use instead of the study's own config.

    Raises UserError for an unknown study, field, label or arm, and as `apply_overrides` and `Study.matching` do.
    """
    study = find.load(name) if config is None else _read_config(config)
    initial = [] if init_from is None else _initial_models(init_from, study)
    fields, labels = _sort(study, overrides)
    study = apply_overrides(study, [*initial, *(expanded for field in fields for expanded in _expand(study, field))])
    widths = [] if match is None else study.matching(match)
    if match is not None:
        print(harmless(f"--match {match}: {' '.join(widths) or 'all arms do'}"), file=sys.stderr)
        study = apply_overrides(study, widths)
    wanted = {key: tuple(value.split(",")) for key, value in (label.split("=", 1) for label in labels)}
    runs = wanted.pop("run", ())
    arms = tuple(study.selected(wanted).arms)
    return Chosen(study=study, arms=arms, runs=runs, overrides=(*overrides, *initial, *widths))


def _sort(study: Study, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the overrides of fields, and the selections by label."""
    fields, labels = [], []
    known, labels_known = {**field_types(Study), **field_types(Run)}, (*study.label_names(), "run")
    for override in overrides:
        path, equals, _ = override.partition("=")
        head = path.partition(".")[0]
        if not equals or not all(path.split(".")):
            raise UserError(f"{override!r} is not an override; valid: path.to.field=value")
        if head in known:
            fields.append(override)
        elif head == path and head in labels_known:
            labels.append(override)
        else:
            raise UserError(f"unknown field {head!r}: {nearest(head, [*known, *labels_known])}")
    return fields, labels


def _expand(study: Study, override: str) -> Iterator[str]:
    """Yields the override for every arm that it is about; that of a study's own field as it is."""
    head, *rest = override.partition("=")[0].split(".")
    if head != "arms" and head in field_types(Study):
        yield override
    elif head != "arms":
        yield from (f"arms.{arm}.{override}" for arm in study.arms)
    elif rest and (matching := fnmatch.filter(study.arms, rest[0])):
        yield from (override.replace(f"arms.{rest[0]}", f"arms.{arm}", 1) for arm in matching)
    elif rest:
        raise UserError(f"unknown arm {rest[0]!r} in arms: {nearest(rest[0], study.arms)}")
    else:
        yield override


def _read_config(path: Path) -> Study:
    found = read_object(path)
    is_stored = found.pop("schema_version", None) is not None  # `study.json` of a directory, of any version
    try:
        return from_earlier_json(Study, found) if is_stored else from_json(Study, found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def print_resolved(study: Study) -> None:
    """Prints the config as JSON, for `--print-config`."""
    print(harmless(json.dumps(to_json(study), indent=2, ensure_ascii=False)))


def study_directory(name: str, run_dir: Path | None) -> Path:
    """Returns where the study's runs go. Raises UserError where no folder can be made."""
    chosen = RUNS / Path(name).stem if run_dir is None else run_dir
    check_folder(chosen, "--run-dir")
    return chosen


def _initial_models(model: str, study: Study) -> list[str]:
    """Returns `--init-from` as overrides of the arms that start from no other arm."""
    return [
        f"arms.{arm}.init.path={json.dumps(_initial_model(model, arm))}"
        for arm, run in study.arms.items()
        if run.after is None
    ]


def _initial_model(model: str, arm: str) -> str:
    """The arm's own run directory where `model` is a whole study's (`DIR` or `DIR@STEP`); else `model` itself."""
    folder = re.sub(r"@\d+$", "", model)
    own = f"{Path(folder) / arm}{model.removeprefix(folder)}"
    return own if (user_path(folder) / arm / RunFiles.CONFIG).is_file() else model
