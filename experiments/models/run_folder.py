"""Makes a model folder from a run, so that it can be converted further."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from common.config import to_json
from common.data.tokenizers.byte_pair import BytePairTokenizer
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer
from common.files import json_bytes, write_atomically
from common.infer.texts import TextCodec
from common.progress import ProgressBars
from common.weights.folder import SOURCE, FolderWriter, write_folder
from common.weights.text import byte_pair, sentence_piece
from experiments.families import family_of
from experiments.models.finding import FoundModel, find_model

TOKENIZER = "spiece.model"


def folder_from_run(source: str, destination: Path, progress: ProgressBars) -> list[str]:
    """Writes the parameters and the tokenizer of an arm's run directory (or `DIRECTORY@STEP`); returns remarks.

    Raises UserError where `source` is not a run, or `destination` cannot be written.
    """
    found = find_model(source)
    text = found.open_text()
    with write_folder(destination) as writer:
        _copy_parameters(found, writer, progress)
        described = {"tokenizer": _write_tokenizer(text, writer), **to_json(text.conventions)}
        source_of = {"format": "run", "row_length": found.row_length}
        writer.manifest(model=to_json(found.config), text=described, source=source_of)
    count = found.config.param_count()
    return [f"from {found.parameters.origin}", f"{destination}: {found.config.kind} with {count:,} parameters"]


def _copy_parameters(found: FoundModel, writer: FolderWriter, progress: ProgressBars) -> None:
    """Copies one array at a time, with the saved dtype."""
    stacked_names = family_of(found.config).stacked
    sharding = SingleDeviceSharding(jax.devices()[0])
    with progress.bar("reading parameters", len(found.parameters.shapes)) as advance:
        for name, shape in found.parameters.shapes.items():
            wanted = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            array = np.asarray(found.parameters.read({name: wanted})[name])
            stacked = name.partition(".")[0] in stacked_names
            handle = writer.create(name.replace(".", "/"), shape, array.dtype, stacked=stacked)
            handle.write(array).result()
            advance(1)


def _write_tokenizer(text: TextCodec, writer: FolderWriter) -> dict[str, Any]:
    """Writes the tokenizer's files and returns its entry for the manifest."""
    match text.tokenizer:
        case SentencePieceTokenizer() as pieces:
            # Without extra_ids, Transformers assumes T5's 100 sentinels.
            files = {
                TOKENIZER: pieces.serialized(),
                "tokenizer_config.json": json_bytes({"extra_ids": pieces.appended_sentinels}),
            }
            entry = sentence_piece(TOKENIZER, pieces.appended_sentinels)
        case BytePairTokenizer() as pairs:
            files = pairs.files()
            entry = byte_pair(pairs.appended_sentinels)
        case other:
            raise AssertionError(f"cannot write a {type(other).__name__}")
    (writer.path / SOURCE).mkdir()
    for name, content in files.items():
        write_atomically(writer.path / SOURCE / name, content)
    return entry
