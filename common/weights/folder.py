"""The model folder: weights, config and what their text is written in, on disk.

    FOLDER/model.json      schema version, the model's config as JSON, text conventions, where the weights come from
    FOLDER/parameters/     one tensorstore (zarr3) array for each leaf, `layers.attention.query_DHC/`, chunked by layer
    FOLDER/source/         files carried along as they are: config.json, tokenizers, tensors that are no parameters

Folders are written under a temporary name and renamed when they are whole. Neither reading nor writing needs more
memory than a chunk: `read_leaf` gives a handle that reads slices, as `jax.make_array_from_callback` wants them.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
import tensorstore

from common.config import from_json
from common.errors import UserError, nearest
from common.files import plain_name, read_json, write_json
from common.trees import flatten, nest
from common.weights.safetensors_files import DTYPES as CODES

SCHEMA_VERSION = 1
MANIFEST = "model.json"
PARAMETERS = "parameters"
SOURCE = "source"
PART, LOCK = ".twinstack-part", ".lock"
"""How the name of a folder ends that is being made, and the file in it that its maker holds a lock on."""
CHUNK_BYTES = 64 * 2**20
"""A layer larger than this is stored in several chunks."""
DTYPES = ("float16", "bfloat16", "float32", "float64")
STORED_DTYPES = tuple(CODES.values())
"""Dtypes of tensors in files that weights come from; tensors that are no parameters may have any of them."""


class LeafInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


class FolderWriter:
    """Fills a new model folder; see `write_folder`."""

    def __init__(self, path: Path):
        self.path = path

    def manifest(self, *, model: dict[str, Any], text: dict[str, Any], source: dict[str, Any]) -> None:
        """Writes model.json.

        `model` is a config as `common.config.to_json` gives it. `text` has `tokenizer` (an object with `kind` and
        files relative to the folder, or None), `alignment` ("start_token" | "native"), `start_id`, `eos_ids`,
        `bos_id`, and maybe `prompts`: "targets" where inputs were always empty in training, so that a prompt stands
        after the start token; absent, it is "inputs"; and `eos_after_inputs`: whether inputs end with an end token;
        absent, they do. `source` records what the weights were made from: `format`, a run's `row_length`, and the
        files that can be written again.
        """
        value = {"schema_version": SCHEMA_VERSION, "model": model, "text": text, "source": source}
        write_json(self.path / MANIFEST, value)

    def create(self, leaf: str, shape: tuple[int, ...], dtype: np.dtype, *, stacked: bool) -> tensorstore.TensorStore:
        """An array to write slices into; `leaf` is a path with slashes, `stacked` one with layers in front."""
        assert dtype.name in DTYPES, f"{leaf}: parameters are not kept as {dtype}"
        metadata = {
            "data_type": dtype.name,
            "shape": list(shape),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": _chunk(shape, dtype, stacked)}},
        }
        spec = _spec(self.path, leaf) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        return tensorstore.open(spec, create=True).result()

    def copy(self, file: Path, name: str | None = None) -> None:
        """Carries a file along unchanged."""
        (self.path / SOURCE).mkdir(exist_ok=True)
        shutil.copyfile(file, self.path / SOURCE / (name or file.name))

    def write_tree(self, tree: Mapping[str, Any], stacked: tuple[str, ...]) -> None:
        """All leaves of a nested dict of arrays; those under a name of `stacked` have layers in front."""
        for leaf, value in flatten(tree, "/").items():
            array = np.asarray(value)
            handle = self.create(leaf, array.shape, array.dtype, stacked=leaf.partition("/")[0] in stacked)
            handle.write(array).result()


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder that becomes `destination` at the end, or is removed.

    Raises:
        UserError: where something is there already, another process is making it, or its parent cannot be written.
    """
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination} exists: name a folder that does not")
    with scratch_folder(destination) as temporary:
        yield temporary
        os.rename(temporary, destination)
        (destination / LOCK).unlink()


@contextlib.contextmanager
def scratch_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder beside `destination` that is removed at the end, unless it is somewhere else by then.

    Those that killed processes left in the same place are removed first: whoever is alive holds a lock on its own.
    Raises UserError as `new_folder` does.
    """
    temporary = destination.with_name(f".{destination.name}{PART}")
    with contextlib.ExitStack() as hold:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            for left in destination.parent.glob(f".*{PART}"):
                _remove_left(left)
            if temporary.exists():
                raise UserError(f"{destination} is being made by another process")
            temporary.mkdir()
            hold.enter_context(_locked(temporary))
        except OSError as error:
            raise UserError(f"{destination} cannot be written ({error.strerror})") from None
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises OSError where another process holds it. A hold ends with its process."""
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _remove_left(folder: Path) -> None:
    """Removes a temporary folder, unless the process that fills it is alive."""
    with contextlib.suppress(OSError), _locked(folder):
        shutil.rmtree(folder)


@contextlib.contextmanager
def write_folder(destination: Path) -> Iterator[FolderWriter]:
    """A writer whose folder appears at `destination` when the block ends well, and never otherwise.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     path = Path(name) / "model"
    ...     with write_folder(path) as writer:
    ...         writer.manifest(model={"kind": "tiny"}, text={}, source={})
    ...         writer.write_tree({"layers": {"scale_D": np.ones((2, 3), np.float32)}}, stacked=("layers",))
    ...     leaf_shapes(path), read_leaf(path, "layers/scale_D")[1, :2].read().result()
    ({'layers': {'scale_D': LeafInfo(shape=(2, 3), dtype=dtype('float32'))}}, array([1., 1.], dtype=float32))
    """
    with new_folder(destination) as temporary:
        (temporary / PARAMETERS).mkdir()
        yield FolderWriter(temporary)


def is_folder(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What model.json says: `model`, `text`, `source`.

    Raises:
        UserError: where `folder` is no model folder, or one of another schema.
    """
    if not is_folder(folder):
        raise UserError(f"{folder} is no model folder: it has no {MANIFEST}; `twinstack convert` makes one")
    manifest = read_json(folder / MANIFEST)
    schema = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if schema != SCHEMA_VERSION:
        raise UserError(f"{folder / MANIFEST} has schema {schema}, this version reads {SCHEMA_VERSION}: convert again")
    missing = [name for name in ("model", "text", "source") if not isinstance(manifest.get(name), dict)]
    if missing:
        raise UserError(f"{folder / MANIFEST} lacks {', '.join(missing)}: convert again")
    try:
        _check_source(manifest["source"])
    except UserError as error:
        raise UserError(f"{folder / MANIFEST}: source: {error}") from None
    return manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SourceFile:
    """The record in `source.files` of a file that weights came from."""

    name: str
    metadata: dict[str, str] | None
    tensors: tuple[tuple[str, str], ...]
    """Names and dtypes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SourceFiles:
    files: tuple[_SourceFile, ...]


def _check_source(source: Mapping[str, Any]) -> None:
    """Files of that name are written when the weights become what they were."""
    length = source.get("row_length")
    if length is not None and (type(length) is not int or length < 1):
        raise UserError(f"row_length is {length!r}, which is no number of slots")
    if ("files" in source) != ("model_type" in source):
        raise UserError("files and model_type go together")
    if "files" not in source:
        return
    if not isinstance(source["model_type"], str):
        raise UserError(f"model_type is {source['model_type']!r}, which is no text")
    files = from_json(_SourceFiles, {"files": source["files"]}).files
    names = [plain_name(file.name, "files") for file in files]
    tensors = [tensor for file in files for tensor, _ in file.tensors]
    for what in (names, tensors):
        if len(set(what)) < len(what):
            raise UserError(f"{next(name for name in what if what.count(name) > 1)!r} stands in files twice")
    if wrong := [name for name in names if not name.endswith(".safetensors")]:
        raise UserError(f"{wrong[0]!r} is not the name of a safetensors file")
    for tensor, dtype in (pair for file in files for pair in file.tensors):
        if dtype not in STORED_DTYPES:
            raise UserError(f"{tensor} has dtype {dtype!r}: {nearest(dtype, STORED_DTYPES)}")


def leaf_shapes(folder: Path) -> dict[str, Any]:
    """Nested dict, as the model's parameters are, of (shape, dtype)."""
    names = sorted(path.name for path in (folder / PARAMETERS).glob("*") if (path / "zarr.json").is_file())
    leaves = [name.replace(".", "/") for name in names]
    handles = {leaf: read_leaf(folder, leaf) for leaf in leaves}
    return nest({leaf: LeafInfo(tuple(h.shape), np.dtype(h.dtype.numpy_dtype)) for leaf, h in handles.items()}, "/")


def read_leaf(folder: Path, leaf: str) -> tensorstore.TensorStore:
    """A handle on one array; `handle[slices].read().result()` is numpy, and a torn file an error, never zeros.

    Raises:
        UserError: where the leaf is not there or cannot be read.
    """
    try:
        return tensorstore.open(_spec(folder, leaf) | {"fill_missing_data_reads": False}, open=True).result()
    except ValueError as error:
        raise UserError(f"{folder}: parameter {leaf} cannot be read ({str(error)[:200]})") from None


def write_chunk(handle: tensorstore.TensorStore) -> tuple[int, ...]:
    """Shape of the pieces in which an array is stored: slices that hold whole ones are the quickest to move."""
    shape = handle.chunk_layout.write_chunk.shape
    assert shape is not None, "arrays of model folders have a regular grid"
    return tuple(int(size or 1) for size in shape)


def copy_leaf(origin: tensorstore.TensorStore, target: tensorstore.TensorStore) -> None:
    """Fills `target` with what `origin` holds, one stored piece at a time: of a slice across them all would be read."""
    steps = [range(0, size, piece) for size, piece in zip(target.shape, write_chunk(target), strict=True)]
    for corner in itertools.product(*steps):
        piece = tuple(
            slice(start, min(start + step.step, step.stop)) for start, step in zip(corner, steps, strict=True)
        )
        target[piece].write(origin[piece].read().result()).result()


def _spec(folder: Path, leaf: str) -> dict[str, Any]:
    path = folder.resolve() / PARAMETERS / leaf.replace("/", ".")
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


def _chunk(shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> list[int]:
    """One layer, halved along its longest axis until it is small enough."""
    chunk = [1, *shape[1:]] if stacked else list(shape)
    while math.prod(chunk) * dtype.itemsize > CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return chunk
