"""Finds and opens trained models on disk: those of runs and those in model folders."""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from common.config import from_earlier_json
from common.data.cache import default_cache_dir
from common.data.config import BytePairConfig, DataConfig, SentencePieceConfig, TokenizerConfig
from common.data.objectives.config import Objective, PrefixLM, Supervised, has_inputs
from common.data.streams import open_tokenizer_of, open_training_text
from common.data.tokenizers.saved import MODEL, load_saved
from common.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from common.errors import UserError
from common.files import inside, read_object
from common.infer.policy import Policy
from common.infer.texts import TextCodec, TextConventions
from common.model import skeleton
from common.paths import user_path
from common.recipe import Execution
from common.train import run_dir as rd
from common.train.init_from import load_parameters
from common.train.run_files import RunFiles, StudyFiles
from common.train.state import check_divides
from common.train.stored import FolderParameters, RunParameters, StoredParameters
from common.weights import folder
from common.weights.t5x import is_checkpoint
from experiments.families import ModelConfig, builder


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model on disk. Only its description has been read."""

    config: ModelConfig
    parameters: StoredParameters
    open_text: Callable[[], TextCodec]
    """Loads the tokenizer and the conventions of the model's texts."""
    row_length: int | None = None
    """Input plus target slots per row in training; None where unknown."""
    tokenizer_path: str | None = None
    """A path from which another run can load the same tokenizer; None if there is none that describes it fully."""


def open_model(path: str, execution: Execution, mesh: Mesh, dtype: Any = jnp.float32) -> Policy:
    """Opens the model at `path` (see `find_model`). Each device reads its own shards of the parameters, as `dtype`.

    Raises UserError where there is no model, it cannot be read, or the mesh does not divide it.
    """
    found = find_model(path)
    return open_found(found, found.open_text(), execution, mesh, dtype)


def open_found(
    found: FoundModel, text: TextCodec, execution: Execution, mesh: Mesh, dtype: Any = jnp.float32
) -> Policy:
    """Opens a model like `open_model`, once the caller has found it and opened its text codec."""
    model = skeleton(builder(found.config, execution))
    params, _ = load_parameters(found.parameters, model, check_divides(model, mesh), dtype=dtype)
    return Policy(
        config=found.config,
        model=model,
        params=params,
        mesh=mesh,
        text=text,
        execution=execution,
        origin=found.parameters.origin,
    )


def find_model(path: str) -> FoundModel:
    """Finds the model at `path`.

    `path` is a model folder, an arm's run directory (the newest good checkpoint; `PATH@STEP` names another), or the
    directory of a checkpoint. Raises UserError for anything else, which says what is there.
    """
    where, step = _split_step(path)
    found = _find(where, step)
    return dataclasses.replace(found, open_text=functools.partial(_fitting_text, found))


def _find(where: Path, step: int | None) -> FoundModel:
    if step is None and folder.is_folder(where):
        return _in_folder(where)
    if step is None and where.name.isdecimal() and where.parent.name == RunFiles.CHECKPOINTS:
        where, step = where.parent.parent, int(where.name)
    if (where / RunFiles.CONFIG).is_file() and (where / RunFiles.ENVIRONMENT).is_file():
        return _of_run(where, step)
    raise UserError(_no_model(where, step))


def _fitting_text(found: FoundModel) -> TextCodec:
    """Opens the model's text codec. Raises UserError if it uses ids for which the token table has no rows.

    Checks nothing for a model without a tokenizer: there the caller chooses the ids.
    """
    text, rows = found.open_text(), found.config.vocab_size
    if text.tokenizer is None:
        return text
    conventions = text.conventions
    ids_by_name = {
        "the tokenizer": (text.tokenizer.vocab_size - 1,),
        "start_id": (conventions.start_id,),
        "eos_ids": conventions.eos_ids,
        "bos_id": () if conventions.bos_id is None else (conventions.bos_id,),
    }
    for name, tokens in ids_by_name.items():
        if wrong := [token for token in tokens if not 0 <= token < rows]:
            raise UserError(
                f"{found.parameters.origin}: {name} has id {wrong[0]}, but the model's table has {rows} rows "
                f"(ids 0 to {rows - 1}): one of them belongs to another model"
            )
    return text


def _split_step(path: str) -> tuple[Path, int | None]:
    """Splits `DIRECTORY@STEP`, unless a file or directory has that very name."""
    match = re.fullmatch(r"(.+)@(\d+)", path)
    if match is None or user_path(path).exists():
        return user_path(path), None
    return user_path(match[1]), int(match[2])


# Runs.


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RunDescription:
    """The fields of a run's config.json that describe its model."""

    model: ModelConfig
    data: DataConfig


def _of_run(arm_dir: Path, step: int | None) -> FoundModel:
    described = rd.read_described(arm_dir / RunFiles.CONFIG)
    try:
        run = from_earlier_json(_RunDescription, {key: described[key] for key in ("model", "data")})
    except (KeyError, TypeError, UserError) as error:
        raise UserError(f"{arm_dir / RunFiles.CONFIG} is not of this version: {error}") from None
    return FoundModel(
        config=run.model,
        parameters=RunParameters(arm_dir / RunFiles.CHECKPOINTS, step),
        open_text=functools.partial(_text_of_run, arm_dir, run.data),
        row_length=run.data.input_length + run.data.target_length,
        # A byte-pair tokenizer is never named here: its file lacks the special tokens.
        tokenizer_path=str(kept) if (kept := arm_dir / RunFiles.TOKENIZER / MODEL).is_file() else None,
    )


def _text_of_run(arm_dir: Path, data: DataConfig) -> TextCodec:
    tokenizer = tokenizer_of_run(arm_dir, data)
    conventions = TextConventions(
        alignment="start_token",
        start_id=tokenizer.start_id,
        eos_ids=(tokenizer.eos_id,),
        bos_id=None,
        eos_after_inputs=_ends_inputs(data.objective),
        prompts="inputs" if has_inputs(data.objective) else "targets",
    )
    return TextCodec(tokenizer=tokenizer, conventions=conventions)


def tokenizer_of_run(arm_dir: Path, data: DataConfig) -> Tokenizer:
    """Loads the tokenizer that the run saved, or makes it from the data config of a run that saved none.

    Raises UserError if the run was trained with another tokenizer.
    """
    trained_hash = read_object(arm_dir / RunFiles.ENVIRONMENT).get("tokenizer_hash")
    if (arm_dir / RunFiles.TOKENIZER).is_dir():
        tokenizer = load_saved(arm_dir / RunFiles.TOKENIZER)
        source = f"{RunFiles.TOKENIZER}/ holds"
        cause = "without that folder, the tokenizer is made again from the data config, if the data are still there"
    else:
        cache_dir = default_cache_dir()
        tokenizer = open_tokenizer_of(data, open_training_text(data, cache_dir), cache_dir)
        source = "its data config now gives"
        cause = "the source, the tokenizer's file or the library that trains it has changed"
    if trained_hash != tokenizer.content_hash:
        raise UserError(
            f"{arm_dir} was trained with tokenizer {trained_hash}, but {source} {tokenizer.content_hash}: {cause}"
        )
    return tokenizer


def _ends_inputs(objective: Objective) -> bool:
    """Whether eos followed the inputs in training."""
    match objective:
        case Supervised(eos_after_inputs=ends):
            return ends
        case PrefixLM(complementary=complementary):
            return not complementary
        case _:
            return True


# Model folders.


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TypedFields:
    """The fields of model.json that `from_json` reads."""

    model: ModelConfig
    text: TextConventions


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderDescription:
    """The contents of model.json in a model folder."""

    model: ModelConfig
    text: TextConventions
    tokenizer: TokenizerConfig | None
    add_bos: bool
    manifest: dict[str, Any]
    """The whole of model.json, unchanged."""


def describe_folder(path: Path) -> FolderDescription:
    """Reads model.json. Raises UserError where `path` is no model folder, or model.json is malformed."""
    manifest = folder.read_manifest(path)
    text = dict(manifest["text"])
    tokenizer = text.pop("tokenizer", None)
    try:
        known = from_earlier_json(_TypedFields, {"model": manifest["model"], "text": text})
        config = None if tokenizer is None else _tokenizer_config(tokenizer, path)
    except UserError as error:
        raise UserError(f"{path / folder.MANIFEST}: {error}") from None
    return FolderDescription(
        model=known.model,
        text=known.text,
        tokenizer=config,
        add_bos=bool((tokenizer or {}).get("add_bos")),
        manifest=manifest,
    )


def _in_folder(path: Path) -> FoundModel:
    described = describe_folder(path)
    return FoundModel(
        config=described.model,
        parameters=FolderParameters(path),
        tokenizer_path=None if described.tokenizer is None else described.tokenizer.path,
        open_text=lambda: TextCodec(
            conventions=described.text,
            tokenizer=None if described.tokenizer is None else load_tokenizer(described.tokenizer),
            add_bos=described.add_bos,
        ),
    )


def _tokenizer_config(described: Any, path: Path) -> TokenizerConfig:
    """Returns the config for `text.tokenizer` of model.json, whose file names are relative to the folder.

    `common.weights.text` writes it. Raises UserError where it is malformed.
    """
    match described:
        case {"kind": "sentencepiece", "file": str(file), "sentinels": int(sentinels)}:
            return SentencePieceConfig(path=str(inside(path, file, "text.tokenizer")), sentinels=sentinels)
        case {"kind": "byte_pair", "file": str(file), "sentinels": int(sentinels)}:
            return BytePairConfig(path=str(inside(path, file, "text.tokenizer")), sentinels=sentinels)
        case {"kind": "byte_pair", "vocab": str(vocab), "merges": str(_)}:
            # The config names the folder that holds both files.
            return BytePairConfig(path=str(inside(path, vocab, "text.tokenizer").parent))
    raise UserError(
        f"text.tokenizer is {json.dumps(described)}, which is neither a sentencepiece with file and sentinels "
        "nor a byte_pair with file and sentinels, or with vocab and merges"
    )


# Errors for paths without a model.

_FOREIGN_FILES = (
    ("model.safetensors*", "a Hugging Face folder: `twinstack convert` makes a model folder of it"),
    ("pytorch_model*.bin", "a Hugging Face folder without safetensors; pickles are never read: save it as safetensors"),
)


def _no_model(path: Path, step: int | None) -> str:
    """Returns an error message that describes what is at `path`."""
    wanted = "a model folder, an arm's run directory, DIRECTORY@STEP or a checkpoint's directory"
    if not path.exists():
        there = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(str(path), there, n=1)
        return f"{path} does not exist{f': did you mean {close[0]!r}?' if close else ''}; expected {wanted}"
    if not path.is_dir():
        return f"{path} is a file; expected {wanted}"
    if step is not None and folder.is_folder(path):
        return f"{path} is a model folder, which has no steps: drop @{step}"
    arms = sorted(str(config.parent) for config in path.glob(f"*/{RunFiles.CONFIG}"))
    if arms and any((path / name).is_file() for name in (StudyFiles.STUDY, StudyFiles.EARLIER)):
        shown = ", ".join(arms[:8]) + (f" and {len(arms) - 8} more" if len(arms) > 8 else "")
        return f"{path} is a whole study's directory: name one of its runs, {shown}"
    if is_checkpoint(path):
        return f"{path} is a T5X checkpoint: `twinstack convert` makes a model folder of it"
    for pattern, what in _FOREIGN_FILES:
        if any(path.glob(pattern)):
            return f"{path} is {what}"
    names = sorted(child.name for child in path.iterdir())
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{path} is not {wanted}; it holds {listed or 'nothing'}"
