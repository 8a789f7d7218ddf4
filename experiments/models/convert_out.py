"""Converts a model folder to Hugging Face's layout, or to the other family."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import to_json
from common.data.config import SentencePieceConfig
from common.errors import UserError
from common.files import read_json, write_json
from common.progress import ProgressBars
from common.trees import flatten
from common.weights import folder as model_folder
from common.weights.folder import copy_leaf, leaf_shapes, new_folder, read_leaf, write_folder
from common.weights.formats import HuggingFaceFormat
from common.weights.safetensors_files import INDEX
from common.weights.settings import Settings
from common.weights.stream import EXTRAS, check_leaves, export_weights
from experiments.families import FAMILIES, ModelConfig, family_of
from experiments.models.finding import FolderDescription, describe_folder

HUGGING_FACE = "hugging_face"
"""Value of `format` in a model folder's source."""


def hugging_face_formats() -> dict[str, HuggingFaceFormat]:
    """Returns the formats of all families by `model_type`."""
    return {format.model_type: format for family in FAMILIES for format in family.load_formats().hugging_face}


def convert_folder(source: Path, destination: Path, progress: ProgressBars, to: str, rung: int | None) -> list[str]:
    """Converts a model folder to Hugging Face's layout (`to="hf"`), or to the other family; returns remarks.

    Raises UserError where the target cannot express the model.
    """
    described = describe_folder(source)
    config, manifest = described.model, described.manifest
    if to == "hf":
        return _to_hugging_face(source, destination, progress, described)
    if to == config.kind:
        raise UserError(f"--to {to}: the model is a {to} already")
    changes = family_of(config).changes
    if to not in changes:
        raise UserError(f"--to {to}: a {config.kind} becomes {', '.join(sorted(changes))} only")
    change = changes[to]
    changed: ModelConfig = change.config(config, rung or 0)
    leaves: dict[str, Any] = flatten(leaf_shapes(source), "/")
    _copy_renamed(source, destination, progress, change.origins(leaves, changed), changed, manifest)
    return [summary(changed, destination)]


def _to_hugging_face(
    source: Path, destination: Path, progress: ProgressBars, described: FolderDescription
) -> list[str]:
    config, recorded = described.model, described.manifest["source"]
    origin = recorded if _is_unchanged(source, config, recorded) else {}
    written = None if origin else _config_json(described)
    model_type = str((written or origin)["model_type"])
    names = [key for file in origin.get("files", ()) for key, _ in file["tensors"]]
    table = hugging_face_formats()[model_type].table(config, names)
    check_leaves(source, table)
    total = len(names) or len(table.tensors())
    with new_folder(destination) as temporary, progress.bar("writing tensors", total) as advance:
        index = export_weights(table, source, temporary, origin, advance)
        for path in sorted((source / model_folder.SOURCE).glob("*")):
            if path.name != EXTRAS and path.is_file():
                shutil.copyfile(path, temporary / path.name)
        if written is not None:
            write_json(temporary / "config.json", written)
        if index is not None:
            write_json(temporary / INDEX, index)
    remarks = [] if origin else _remarks_on_ids(described)
    return [*remarks, f"{destination}: {model_type} in Hugging Face's layout"]


def _remarks_on_ids(described: FolderDescription) -> list[str]:
    """Returns remarks on the ids that the model was trained to read, and where Transformers' tokenizer differs."""
    text, config = described.text, described.model
    if text.alignment == "native":
        return []
    ends = text.eos_after_inputs and bool(text.eos_ids)
    inputs = ["the inputs", *([f"{text.eos_ids[0]} (end token)"] if ends else [])] if text.prompts == "inputs" else []
    targets = [f"{text.start_id} (start token)", "the targets"]
    one_sequence = not family_of(config).encodes_inputs
    if one_sequence:
        remarks = [f"the model reads one sequence of ids: {', '.join((*inputs, *targets))}"]
    else:
        read = ", ".join(inputs) or "nothing"
        remarks = [f"the model reads ids: {read} in the encoder, {', '.join(targets)} in the decoder"]
    if isinstance(described.tokenizer, SentencePieceConfig):
        name = Path(described.tokenizer.path or "").name
        theirs = "folds spaces and has no bytes for unknown characters: where that matters,"
        if one_sequence:
            theirs = f"reads no {name} for this kind of model:"
        remarks.append(f"Transformers {theirs} encode with {name} and the library sentencepiece")
    elif described.tokenizer is not None:
        remarks.append("tokenizer.json writes the same ids as here, without end and start tokens")
    return remarks


def _is_unchanged(source: Path, config: ModelConfig, origin: dict[str, Any]) -> bool:
    """Whether a model folder came from a Hugging Face folder and still has the config of that."""
    path = source / model_folder.SOURCE / "config.json"
    if origin.get("format") != HUGGING_FACE or not path.is_file():
        return False
    model_type, tied, values = origin["model_type"], config.recipe.tied_embeddings, read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object")
    formats = {format.model_type: format for format in family_of(config).load_formats().hugging_face}
    if model_type not in formats:
        return False
    before, _ = formats[model_type].read_config(Settings(values, str(path)), tied)
    trained_with = {name: getattr(config.recipe, name) for name in ("dropout", "z_loss", "init")}
    recipe = dataclasses.replace(before.recipe, **trained_with)
    return dataclasses.replace(before, recipe=recipe) == config


def _config_json(described: FolderDescription) -> dict[str, Any]:
    """Returns the contents of config.json in Hugging Face's layout."""
    config, text = described.model, described.text
    ids: dict[str, Any] = {"eos_token_id": text.eos_ids[0] if len(text.eos_ids) == 1 else list(text.eos_ids) or None}
    formats = family_of(config).load_formats()
    written = formats.write_config(config, described.manifest["source"].get("row_length"))
    return written | ids | formats.special_ids(text)


def _copy_renamed(
    source: Path,
    destination: Path,
    progress: ProgressBars,
    origins: Mapping[str, str],
    new: ModelConfig,
    manifest: dict[str, Any],
) -> None:
    """Writes a model folder of the other family: copies the leaf `origins[name]` under each new `name`."""
    leaves: dict[str, Any] = flatten(leaf_shapes(source), "/")
    stacked = family_of(new).stacked
    with write_folder(destination) as writer, progress.bar("copying arrays", len(origins)) as advance:
        for leaf, origin in origins.items():
            info = leaves[origin]
            is_stacked = leaf.partition("/")[0] in stacked
            target = writer.create(leaf, info.shape, info.dtype, stacked=is_stacked)
            copy_leaf(read_leaf(source, origin), target)
            advance(1)
        for path in sorted((source / model_folder.SOURCE).glob("**/*")):
            if path.is_file():
                inner = path.relative_to(source / model_folder.SOURCE)
                (writer.path / model_folder.SOURCE / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, writer.path / model_folder.SOURCE / inner)
        writer.manifest(model=to_json(new), text=manifest["text"], source=manifest["source"])


def summary(config: ModelConfig, destination: Path) -> str:
    return f"{destination}: {config.kind} with {config.param_count():,} parameters"
