"""Checks the models on disk that runs start from: do parameters and token tables fit, and are they still the same?"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import to_json
from common.data.tokenizers.byte_pair import BytePairTokenizer
from common.data.tokenizers.pieces import differing_ids, piece
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from common.files import read_object
from common.model import skeleton
from common.train import run_dir as rd
from common.train.config import InitFrom
from common.train.init_from import check_rules, loads_tables
from common.train.run_files import RunFiles
from common.train.stored import FolderParameters, has_checkpoint
from common.train.task import Initial
from common.weights import folder
from experiments.families import ModelConfig, builder
from experiments.models.finding import FoundModel, find_model
from experiments.run import Run

TRAINED_WITH = ("recipe.dropout", "recipe.z_loss", "recipe.init")
"""Fields of a model's config that change no weight's name or shape."""
INITIAL_CONTENT = "initial_content"
"""Where `environment.json` has the hash of the weights that a run started from."""
SAMPLE_BYTES = 4096
"""How much of the beginning and of the end of a file of parameters is hashed: other weights differ everywhere."""


def make_initial(init: InitFrom | None) -> Initial | None:
    """Returns the model that a run starts from; None if it starts fresh. Opens it only when called for."""
    return None if init is None else Initial(open=lambda: find_model(init.path).parameters, rules=init.rules)


def initial_content(init: InitFrom | None, run_dir: Path) -> str | None:
    """Returns a hash of the weights on disk that a run starts from, as its directory is to record it, hexadecimal.

    None if it starts fresh, and where nothing is to be recorded: a run that has begun may go on when the model is gone,
    or when its directory was written before hashes were. The hash is of a run's stored checksums, or of a sample of
    each of a model folder's files, so that it costs next to nothing.

    Raises UserError where a run has begun from other weights, and where one that has not finds no model.
    """
    if init is None:
        return None
    if not rd.has_begun(run_dir):
        return _content(init)
    before = read_object(run_dir / RunFiles.ENVIRONMENT).get(INITIAL_CONTENT)
    try:
        now = _content(init) if before is not None else None
    except UserError:
        return None
    if now != before:
        raise UserError(
            f"{run_dir} began from other weights than {init.path} holds now (hash {before}, now {now}): choose another "
            "--run-dir, or remove it"
        )
    return now


def _content(init: InitFrom) -> str:
    parameters = find_model(init.path).parameters
    return _sampled(parameters.path) if isinstance(parameters, FolderParameters) else parameters.content()


def _sampled(model_folder: Path) -> str:
    """Returns a hash of name, size, beginning and end of each of a model folder's files of parameters."""
    top, hashed = model_folder / folder.PARAMETERS, hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in top.glob("**/*") if path.is_file()):
        size = path.stat().st_size
        with path.open("rb") as file:
            ends = file.read(SAMPLE_BYTES)
            file.seek(max(0, size - SAMPLE_BYTES))
            ends += file.read(SAMPLE_BYTES)
        hashed.update(f"{path.relative_to(top).as_posix()} {size}\n".encode() + ends)
    return hashed.hexdigest()


def check_initial(name: str, run: Run, run_dir: Path | None) -> list[str]:
    """Compares the model on disk that the arm `name` starts from with its own, and returns a line per difference.

    A run that has checkpoints in `run_dir` is skipped: it resumes from those. Raises UserError where the model cannot
    be found, or a parameter is missing there and no rule covers it.
    """
    init = _pending(run, run_dir)
    if init is None:
        return []
    found, model = find_model(init.path), skeleton(builder(run.model, run.train.execution))
    differing = dict(_differences(to_json(run.model), to_json(found.config)))
    try:
        check_rules(found.parameters, model, init.rules, where=f"arms.{name}.init")
    except UserError as error:
        raise UserError(f"{error}{_remedy(name, run, init, found.config, differing)}") from None
    return [
        f"{name}: not as in {found.parameters.origin}: {path}: {json.dumps(theirs)} -> {json.dumps(ours)}"
        for path, (ours, theirs) in differing.items()
    ]


def check_tokenizer(name: str, run: Run, tokenizer: Tokenizer, run_dir: Path | None) -> list[str]:
    """Returns a line if the model that the arm starts from has no known tokenizer, or a permitted other one.

    Raises UserError for another tokenizer that the config does not permit: rows of the token tables would stand for
    other tokens.
    """
    init = _pending(run, run_dir)
    if init is None:
        return []
    found, model = find_model(init.path), skeleton(builder(run.model, run.train.execution))
    if not loads_tables(found.parameters, model, init.rules):
        return []
    theirs = found.open_text().tokenizer
    if theirs is None:
        return [f"{name}: {found.parameters.origin} has no tokenizer, so it may have been trained with another"]
    different, compared = differing_ids(tokenizer, theirs)
    if not different:
        return []
    ids = _describe_ids(different, compared, tokenizer, theirs)
    if init.tokenizer == "same":
        raise UserError(
            f"{name} would start from {found.parameters.origin}, which has another tokenizer: {ids}. "
            f"{_overrides_for_tokenizer(found, theirs)}arms.{name}.init.tokenizer=any loads its tables as they are"
        )
    return [f"warning: {name} starts with token tables of another tokenizer: {ids}"]


def _pending(run: Run, run_dir: Path | None) -> InitFrom | None:
    """Returns where the run's parameters come from; None if it starts fresh or resumes."""
    if run_dir is not None and has_checkpoint(run_dir / RunFiles.CHECKPOINTS):
        return None
    return run.init


def _differences(ours: Any, theirs: Any, path: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yields (path, (our value, their value)) for each plain value in which two JSON configs differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**ours, **theirs}:
            yield from _differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
    elif ours != theirs:
        yield path, (ours, theirs)


def _remedy(name: str, run: Run, init: InitFrom, theirs: ModelConfig, differing: dict[str, tuple[Any, Any]]) -> str:
    """Returns the most likely remedy, to be appended to an error message."""
    if theirs.kind != run.model.kind:
        return f". It is a {theirs.kind}: run `twinstack convert {init.path} NEW --to {run.model.kind}` first"
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
