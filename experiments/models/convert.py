"""Converts foreign checkpoints and runs into model folders, and model folders further (`convert_out`)."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.config import to_json
from common.errors import UserError, nearest
from common.files import read_json
from common.progress import ProgressBars
from common.train.run_files import RunFiles
from common.weights import folder as model_folder
from common.weights.folder import FolderWriter, scratch_folder, write_folder
from common.weights.formats import HEAD, HuggingFaceFormat
from common.weights.mapping import Checkpoint, Table, match
from common.weights.safetensors_files import INDEX, SINGLE, SafetensorsFolder
from common.weights.settings import Settings
from common.weights.stream import import_weights, same_bytes
from common.weights.t5x import SENTINELS, T5XCheckpoint, is_checkpoint
from common.weights.text import CARRIED, sentence_piece
from experiments.families import FAMILIES, Family, ModelConfig
from experiments.models.convert_out import HUGGING_FACE, convert_folder, hugging_face_formats, summary
from experiments.models.run_folder import folder_from_run

TARGETS = ("hf", *(family.kind for family in FAMILIES))
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
T5X = "t5x"
"""Value of `format` in a model folder's source."""


def convert(
    source: Path,
    destination: Path,
    progress: ProgressBars,
    *,
    to: str | None = None,
    rung: int | None = None,
    config_name: str | None = None,
    tokenizer: Path | None = None,
) -> list[str]:
    """Converts `source` and returns remarks for the user.

    A Hugging Face folder, a T5X checkpoint or an arm's run directory becomes a model folder. With `to`, that model
    folder is converted further: to a Hugging Face folder (`to="hf"`), or to the other family (`to="gpt"`, or
    `to="t5like"` at a rung of the ladder).

    Args:
        config_name: name of a size, for a T5X checkpoint whose shapes do not determine the config.
        tokenizer: SentencePiece model for a T5X checkpoint, which contains none.

    Raises:
        UserError: where `source` is none of these or cannot be converted; `destination` is not created then.
    """
    _check_destination(source, destination)
    if to is not None and to not in TARGETS:
        raise UserError(f"--to {to}: {nearest(to, TARGETS)}")
    if rung is not None and to != "t5like":
        raise UserError("--rung is for --to t5like")
    for option, value in (("--config", config_name), ("--tokenizer", tokenizer)):
        if value is not None and not is_checkpoint(source):
            raise UserError(f"{option} is for T5X checkpoints, and {source} is not one")
    if model_folder.is_folder(source):
        if to is None:
            raise UserError(f"{source} is a model folder: add --to {', --to '.join(TARGETS)}")
        return convert_folder(source, destination, progress, to, rung)
    if to is None:
        return _into_folder(source, destination, progress, config_name, tokenizer)
    if destination.exists():  # fails here rather than after the first half of the work
        raise UserError(f"{destination} exists: name a folder that does not")
    with scratch_folder(destination.with_name(f"{destination.name}-model")) as scratch:
        *remarks, _ = _into_folder(source, scratch / "model", progress, config_name, tokenizer)
        return [*remarks, *convert_folder(scratch / "model", destination, progress, to, rung)]


def _into_folder(
    source: Path, destination: Path, progress: ProgressBars, config_name: str | None, tokenizer: Path | None
) -> list[str]:
    """Makes a model folder and returns remarks, the last of which describes the model."""
    if is_checkpoint(source):
        return _from_t5x(source, destination, progress, config_name, tokenizer)
    if (_without_step(source) / RunFiles.ENVIRONMENT).is_file():
        return folder_from_run(str(source), destination, progress)
    _refuse_unreadable(source)
    return _from_hugging_face(source, destination, progress)


def _check_destination(source: Path, destination: Path) -> None:
    if str(destination) == "-":
        raise UserError("the destination is '-', but a folder cannot go to standard output: name one")
    if destination.resolve().is_relative_to(_without_step(source).resolve()):
        raise UserError(f"{destination} lies inside {source}: name a folder outside of it")


def _without_step(source: Path) -> Path:
    """Returns the run directory of `DIRECTORY@STEP`."""
    return source if source.exists() else Path(re.sub(r"@\d+$", "", str(source)))


def _refuse_unreadable(source: Path) -> None:
    """Raises UserError unless `source` has the files of a Hugging Face folder with safetensors."""
    kinds = "a Hugging Face folder (config.json and safetensors), a T5X checkpoint or a model folder"
    if source.is_file() and source.suffix in PICKLES:
        raise UserError(f"{source} is a pickle, which can run code when it is read; convert takes {kinds}")
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; convert takes {kinds}")
    if not (source / SINGLE).is_file() and not (source / INDEX).is_file():
        pickles = sorted(path.name for path in source.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise UserError(
                f"{source} has its weights in {pickles[0]}, a pickle, which can run code when it is read: "
                "save them as safetensors first"
            )
        steps = sorted(path.name for path in source.iterdir() if is_checkpoint(path))
        hint = f"; it holds checkpoints: {', '.join(steps[:5])}" if steps else ""
        raise UserError(f"{source} has no {SINGLE}, {INDEX}, {model_folder.MANIFEST} or T5X index{hint}")
    if not (source / "config.json").is_file():
        raise UserError(f"{source} has no config.json")


def _from_hugging_face(source: Path, destination: Path, progress: ProgressBars) -> list[str]:
    where = str(source / "config.json")
    values = read_json(source / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{where} is not a JSON object")
    formats = hugging_face_formats()
    model_type = str(values.get("model_type"))
    if model_type not in formats:
        raise UserError(f"{where}: model_type {model_type!r}: {nearest(model_type, formats)}")
    format = formats[model_type]
    checkpoint = SafetensorsFolder(source)
    config, remarks = _read_config(format, values, where, checkpoint)
    text, text_remarks = format.read_text(source, values)
    origin = {"format": HUGGING_FACE, "model_type": model_type, "files": checkpoint.files()}
    with write_folder(destination) as writer:
        _import(format.table(config, checkpoint.tensors), checkpoint, writer, progress)
        for name in (*CARRIED, INDEX):
            if (source / name).is_file():
                writer.copy(source / name)
        writer.manifest(model=to_json(config), text=text, source=origin)
    return [*remarks, *text_remarks, summary(config, destination)]


def _read_config(
    format: HuggingFaceFormat, values: dict[str, Any], where: str, checkpoint: Checkpoint
) -> tuple[ModelConfig, list[str]]:
    """Returns (config, remarks) of a Hugging Face folder from its config.json and tensors."""
    settings = Settings(values, where)
    embedding = next((name for name in format.embeddings if name in checkpoint.tensors), None)
    with _errors_name(where):
        wants_tied = None if format.wants_tied is None else format.wants_tied(settings)
        tied = wants_tied is not False and _is_tied(checkpoint, embedding)
        config, remarks = format.read_config(settings, tied)
    if wants_tied and not tied:
        remarks.append(f"{HEAD} differs from {embedding}, so embeddings are not tied, whatever config.json says")
    return config, remarks


@contextlib.contextmanager
def _errors_name(where: str) -> Iterator[None]:
    """Prefixes UserErrors with the file of the faulty value."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _is_tied(checkpoint: Checkpoint, embedding: str | None) -> bool:
    """Whether the output head is the token table: it is absent, or stored as a copy of it."""
    return embedding is None or HEAD not in checkpoint.tensors or same_bytes(checkpoint, HEAD, embedding)


def _from_t5x(
    source: Path, destination: Path, progress: ProgressBars, config_name: str | None, tokenizer: Path | None
) -> list[str]:
    checkpoint = T5XCheckpoint(source)
    family = next(family for family in FAMILIES if family.load_formats().t5x.fits(checkpoint.tensors))
    format = family.load_formats().t5x
    remarks = ["layers are stacked (scanned)"] if checkpoint.scanned else []
    config: ModelConfig
    if config_name is not None:
        config = _size(config_name, family)
    else:
        config, assumed = format.read_config(checkpoint.tensors, str(source))
        sizes = {name: value for name, value in to_json(config).items() if isinstance(value, int)}
        remarks += [f"read from shapes: {', '.join(f'{name}={value}' for name, value in sizes.items())}", *assumed]
    if tokenizer is None:
        remarks.append("T5X checkpoints contain no tokenizer: --tokenizer FILE adds the SentencePiece model")
    elif not tokenizer.is_file():
        raise UserError(f"--tokenizer {tokenizer} is not a file")
    text = {"tokenizer": tokenizer and sentence_piece(tokenizer.name, SENTINELS), **format.text}
    with write_folder(destination) as writer:
        _import(format.table(config), checkpoint, writer, progress)
        if tokenizer is not None:
            writer.copy(tokenizer)
        writer.manifest(model=to_json(config), text=text, source={"format": T5X, "scanned": checkpoint.scanned})
    return [*remarks, summary(config, destination)]


def _size(name: str, family: Family[Any]) -> ModelConfig:
    if name not in family.sizes:
        raise UserError(f"--config {name!r} is not a size of {family.kind}: {nearest(name, family.sizes)}")
    return family.sizes[name]


def _import(table: Table, checkpoint: Checkpoint, writer: FolderWriter, progress: ProgressBars) -> None:
    found = match(table, checkpoint)
    with progress.bar("reading tensors", len(found.tensors)) as advance:
        import_weights(table, found, checkpoint, writer, advance)
