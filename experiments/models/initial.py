"""Checks the models that arms start from: do the parameters fit, and do the token tables have the same tokens?"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common.config import to_json
from common.data.tokenizers.byte_pair import BytePairTokenizer
from common.data.tokenizers.pieces import differing_ids, piece
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from common.model import Skeleton, skeleton
from common.train.init_from import check_rules, loads_tables
from common.train.run_files import RunFiles
from common.train.stored import has_checkpoint
from common.train.task import Initial
from experiments.config import Arm, Experiment, ModelConfig
from experiments.families import builder
from experiments.models.finding import FoundModel, find_model

TRAINED_WITH = ("recipe.dropout", "recipe.z_loss", "recipe.init")
"""Fields of a model's config that change no weight's name or shape."""


def make_initial(arm: Arm) -> Initial | None:
    """Returns the model that the arm starts from; None if it starts fresh. Opens it only when called for."""
    init = arm.init
    return None if init is None else Initial(open=lambda: find_model(init.path).parameters, rules=init.rules)


def check_initial(experiment: Experiment, run_dir: Path | None, arms: Iterable[str] | None = None) -> list[str]:
    """Compares the models that arms (None: all) start from with the arms' own, and returns a line per difference.

    Arms of `run_dir` that have checkpoints are skipped: they resume from those. Raises UserError where a model cannot
    be found, or a parameter is missing there and no rule covers it.
    """
    lines = []
    for name, arm, found, model in _initial_models(experiment, run_dir, arms):
        assert arm.init is not None
        differing = dict(_differences(to_json(arm.model), to_json(found.config)))
        try:
            check_rules(found.parameters, model, arm.init.rules, where=f"arms.{name}.init")
        except UserError as error:
            raise UserError(f"{error}{_remedy(name, arm, found.config, differing)}") from None
        lines += [
            f"{name}: not as in {found.parameters.origin}: {path}: {json.dumps(theirs)} -> {json.dumps(ours)}"
            for path, (ours, theirs) in differing.items()
        ]
    return lines


def check_tokenizers(
    experiment: Experiment, tokenizer: Tokenizer, run_dir: Path | None, arms: Iterable[str] | None = None
) -> list[str]:
    """Returns a line for each arm that starts from a model with an unknown tokenizer, or with a permitted other one.

    Raises UserError for another tokenizer that the config does not permit: rows of the token tables would stand for
    other tokens. `arms` None: all.
    """
    lines = []
    for name, arm, found, model in _initial_models(experiment, run_dir, arms):
        assert arm.init is not None
        if not loads_tables(found.parameters, model, arm.init.rules):
            continue
        theirs = found.open_text().tokenizer
        if theirs is None:
            lines.append(
                f"{name}: {found.parameters.origin} has no tokenizer, so it may have been trained with another"
            )
            continue
        different, compared = differing_ids(tokenizer, theirs)
        if not different:
            continue
        ids = _describe_ids(different, compared, tokenizer, theirs)
        if arm.init.tokenizer == "same":
            raise UserError(
                f"{name} would start from {found.parameters.origin}, which has another tokenizer: {ids}. "
                f"{_overrides_for_tokenizer(found, theirs)}arms.{name}.init.tokenizer=any loads its tables as they are"
            )
        lines.append(f"warning: {name} starts with token tables of another tokenizer: {ids}")
    return lines


def _initial_models(
    experiment: Experiment, run_dir: Path | None, arms: Iterable[str] | None
) -> Iterator[tuple[str, Arm, FoundModel, Skeleton]]:
    """Yields, for each arm that starts from another model: its name, the arm, that model, the arm's own skeleton."""
    for name in experiment.arms if arms is None else arms:
        arm = experiment.arms[name]
        if arm.init is None or (run_dir is not None and has_checkpoint(run_dir / name / RunFiles.CHECKPOINTS)):
            continue
        yield name, arm, find_model(arm.init.path), skeleton(builder(arm.model, experiment.train.execution))


def _differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yields (path, (our value, their value)) for each plain value in which two JSON configs differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            yield from _differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif ours != theirs:
        yield path, (ours, theirs)


def _remedy(name: str, arm: Arm, theirs: ModelConfig, differing: dict[str, tuple[Any, Any]]) -> str:
    """Returns the most likely remedy, to be appended to an error message."""
    assert arm.init is not None
    if theirs.kind != arm.model.kind:
        return f". It is a {theirs.kind}: run `twinstack convert {arm.init.path} NEW --to {arm.model.kind}` first"
    values = {path: theirs for path, (_, theirs) in differing.items() if path not in TRAINED_WITH}
    texts = (
        f"arms.{name}.model.{path}={value if isinstance(value, str) else json.dumps(value)}"
        for path, value in values.items()
    )
    return f". To take that model's config: {' '.join(texts)}" if values else ""


def _describe_ids(different: list[int], compared: int, ours: Tokenizer, theirs: Tokenizer) -> str:
    first = different[0]
    pair = f"id {first} is {piece(theirs, first)!r} there and {piece(ours, first)!r} here"
    return f"{len(different):,} of {compared:,} ids stand for other tokens ({pair})"


def _overrides_for_tokenizer(found: FoundModel, theirs: Tokenizer) -> str:
    """Returns how to train with the model's own tokenizer, or "" if it has no path."""
    if found.tokenizer_path is None:
        return ""
    kind, sentinels = "sentencepiece", theirs.sentinels
    if isinstance(theirs, BytePairTokenizer):
        kind, sentinels = "byte_pair", theirs.appended_sentinels
    fields = {"kind": kind, "path": found.tokenizer_path, "sentinels": sentinels}
    return f"To use that tokenizer: {' '.join(f'data.tokenizer.{key}={value}' for key, value in fields.items())}; "
