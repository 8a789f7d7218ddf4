"""Checks of the models that arms begin as: whether one fits, and whether its tables stand for the same tokens."""

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
from experiments.models.finding import Found, find_model

TRAINED_WITH = ("recipe.dropout", "recipe.z_loss", "recipe.init")
"""Fields of a model's config that no weight depends on."""


def make_initial(arm: Arm) -> Initial | None:
    init = arm.init
    return None if init is None else Initial(open=lambda: find_model(init.path).parameters, rules=init.rules)


def check_initial(experiment: Experiment, run_dir: Path | None, arms: Iterable[str] | None = None) -> list[str]:
    """How the models that arms (None: all) begin as differ from the arms' own, one line for each difference.

    Raises UserError where one cannot be found or does not account for every parameter. An arm of `run_dir` that has
    checkpoints of its own is skipped: it never reads another's again.
    """
    lines = []
    for name, arm, found, model in _beginning(experiment, run_dir, arms):
        assert arm.init is not None
        differing = dict(_differing(to_json(arm.model), to_json(found.config)))
        try:
            check_rules(found.parameters, model, arm.init.rules, where=f"arms.{name}.init")
        except UserError as error:
            raise UserError(f"{error}{_cure(name, arm, found.config, differing)}") from None
        lines += [
            f"{name}: not as in {found.parameters.origin}: {path}: {json.dumps(theirs)} -> {json.dumps(ours)}"
            for path, (ours, theirs) in differing.items()
        ]
    return lines


def check_tokenizers(
    experiment: Experiment, tokenizer: Tokenizer, run_dir: Path | None, arms: Iterable[str] | None = None
) -> list[str]:
    """One line for each arm that begins as a model with an unknown tokenizer, or another one that the config allows.

    Raises UserError for another one that the config does not allow: its tables' rows would stand for other tokens.
    """
    lines = []
    for name, arm, found, model in _beginning(experiment, run_dir, arms):
        assert arm.init is not None
        if not loads_tables(found.parameters, model, arm.init.rules):
            continue
        theirs = found.open_text().tokenizer
        if theirs is None:
            lines.append(f"{name}: {found.parameters.origin} has no tokenizer: whether it is this one is not known")
            continue
        different, compared = differing_ids(tokenizer, theirs)
        if not different:
            continue
        said = _said(different, compared, tokenizer, theirs)
        if arm.init.tokenizer == "same":
            raise UserError(
                f"{name} would begin as {found.parameters.origin}, whose tokenizer is another: {said}. "
                f"{_its_tokenizer(found, theirs)}arms.{name}.init.tokenizer=any takes its tables as they are"
            )
        lines.append(f"warning: {name} begins with tables of another tokenizer: {said}")
    return lines


def _beginning(
    experiment: Experiment, run_dir: Path | None, arms: Iterable[str] | None
) -> Iterator[tuple[str, Arm, Found, Skeleton]]:
    """Arms that read another model: name, arm, that model, and what is made of it."""
    for name in experiment.arms if arms is None else arms:
        arm = experiment.arms[name]
        if arm.init is None or (run_dir is not None and has_checkpoint(run_dir / name / RunFiles.CHECKPOINTS)):
            continue
        yield name, arm, find_model(arm.init.path), skeleton(builder(arm.model, experiment.train.execution))


def _differing(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Path and values of each plain value in which two configs differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            yield from _differing(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif ours != theirs:
        yield path, (ours, theirs)


def _cure(name: str, arm: Arm, theirs: ModelConfig, differing: dict[str, tuple[Any, Any]]) -> str:
    """The most likely remedy, as the end of an error message."""
    assert arm.init is not None
    if theirs.kind != arm.model.kind:
        return f". It is a {theirs.kind}: `twinstack convert {arm.init.path} NEW --to {arm.model.kind}` comes first"
    values = {path: theirs for path, (_, theirs) in differing.items() if path not in TRAINED_WITH}
    texts = (
        f"arms.{name}.model.{path}={value if isinstance(value, str) else json.dumps(value)}"
        for path, value in values.items()
    )
    return f". To take that model's config: {' '.join(texts)}" if values else ""


def _said(different: list[int], compared: int, ours: Tokenizer, theirs: Tokenizer) -> str:
    first = different[0]
    pair = f"id {first} is {piece(theirs, first)!r} there and {piece(ours, first)!r} here"
    return f"{len(different):,} of {compared:,} ids stand for other tokens ({pair})"


def _its_tokenizer(found: Found, theirs: Tokenizer) -> str:
    """How to train with the model's own tokenizer, if it has a path."""
    if found.tokenizer_path is None:
        return ""
    kind, sentinels = "sentencepiece", theirs.sentinels
    if isinstance(theirs, BytePairTokenizer):
        kind, sentinels = "byte_pair", theirs.appended_sentinels
    fields = {"kind": kind, "path": found.tokenizer_path, "sentinels": sentinels}
    return f"To use that one: {' '.join(f'data.tokenizer.{key}={value}' for key, value in fields.items())}; "
