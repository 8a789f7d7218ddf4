"""The model folder: a model's weights, config, tokenizer and text conventions on disk.

    FOLDER/model.json      schema version, the model's config as JSON, text conventions, where the weights come from
    FOLDER/parameters/     one tensorstore (zarr3) array per leaf, `layers.attention.query_DHC/`, chunked by layer
    FOLDER/source/         files kept unchanged: config.json, tokenizers, tensors that are not parameters

Folders are written under a temporary name and renamed when complete. Reading and writing need no more memory than one
chunk: `read_leaf` returns a handle that reads slices, as `jax.make_array_from_callback` needs them.
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
"""Suffix of an unfinished folder's name, and the file in it that the process writing it holds a lock on."""
CHUNK_BYTES = 64 * 2**20
"""Largest chunk; a larger layer is stored in several."""
DTYPES = ("float16", "bfloat16", "float32", "float64")
STORED_DTYPES = tuple(CODES.values())
"""Dtypes that tensors of a source file may have; parameters are limited to `DTYPES`."""


class LeafInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype


class FolderWriter:
    """Fills a new model folder; see `write_folder`."""

    def __init__(self, path: Path):
        self.path = path

    def manifest(self, *, model: dict[str, Any], text: dict[str, Any], source: dict[str, Any]) -> None:
        """Writes model.json.

        Args:
            model: a config, from `common.config.to_json`.
            text: `tokenizer` (an object with `kind` and file names relative to the folder, or None), `alignment`
                ("start_token" | "native"), `start_id`, `eos_ids`, `bos_id`. Optional: `prompts` ("inputs" by default;
                "targets" if inputs were always empty in training, so that a prompt follows the start token) and
                `eos_after_inputs` (whether inputs end with an end token; true by default).
            source: what the weights were made from: `format`, a run's `row_length`, and the files to reproduce.
        """
        value = {"schema_version": SCHEMA_VERSION, "model": model, "text": text, "source": source}
        write_json(self.path / MANIFEST, value)

    def create(self, leaf: str, shape: tuple[int, ...], dtype: np.dtype, *, stacked: bool) -> tensorstore.TensorStore:
        """Creates an array and returns a handle that slices can be written to.

        `leaf` is a path with slashes; `stacked` means that the first axis is layers.
        """
        assert dtype.name in DTYPES, f"{leaf}: parameters cannot be stored as {dtype}"
        metadata = {
            "data_type": dtype.name,
            "shape": list(shape),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": _chunk(shape, dtype, stacked)}},
        }
        spec = _spec(self.path, leaf) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        return tensorstore.open(spec, create=True).result()

    def copy(self, file: Path, name: str | None = None) -> None:
        """Copies a file, unchanged, into `source/`."""
        (self.path / SOURCE).mkdir(exist_ok=True)
        shutil.copyfile(file, self.path / SOURCE / (name or file.name))

    def write_tree(self, tree: Mapping[str, Any], stacked: tuple[str, ...]) -> None:
        """Writes a nested dict of arrays; `stacked` lists top-level names whose arrays have layers as first axis."""
        for leaf, value in flatten(tree, "/").items():
            array = np.asarray(value)
            handle = self.create(leaf, array.shape, array.dtype, stacked=leaf.partition("/")[0] in stacked)
            handle.write(array).result()


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `destination` at the end of the block, or removed on an error.

    Raises:
        UserError: if `destination` exists, another process is writing it, or its parent is not writable.
    """
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination} exists: name a folder that does not")
    with scratch_folder(destination) as temporary:
        yield temporary
        os.rename(temporary, destination)
        (destination / LOCK).unlink()


@contextlib.contextmanager
def scratch_folder(destination: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `destination`, and removes it at the end unless it has been renamed.

    First removes what killed processes left there: temporary folders on which no process holds a lock.
    Raises UserError if another process is writing `destination`, or its parent is not writable.
    """
    temporary = destination.with_name(f".{destination.name}{PART}")
    with contextlib.ExitStack() as hold:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            for left in destination.parent.glob(f".*{PART}"):
                _remove_abandoned(left)
            if temporary.exists():
                raise UserError(f"{destination} is being written by another process")
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
    """Holds the folder's lock; raises OSError if another process does. The system releases it when the process dies."""
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _remove_abandoned(folder: Path) -> None:
    """Removes a temporary folder, unless the process that writes it is alive."""
    with contextlib.suppress(OSError), _locked(folder):
        shutil.rmtree(folder)


@contextlib.contextmanager
def write_folder(destination: Path) -> Iterator[FolderWriter]:
    """Yields a writer whose folder appears at `destination` if the block succeeds, and only then.

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
    """Whether `path` is a model folder."""
    return (path / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The contents of model.json: `model`, `text`, `source`.

    Raises:
        UserError: if `folder` is not a model folder, or has another schema version.
    """
    if not is_folder(folder):
        raise UserError(f"{folder} is not a model folder: it has no {MANIFEST}; `twinstack convert` makes one")
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
    """An entry of `source.files`: a file that the weights came from."""

    name: str
    metadata: dict[str, str] | None
    tensors: tuple[tuple[str, str], ...]
    """(name, dtype) of each tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SourceFiles:
    files: tuple[_SourceFile, ...]


def _check_source(source: Mapping[str, Any]) -> None:
    """Raises UserError for an invalid `source`; its file names are written to when the files are reproduced."""
    length = source.get("row_length")
    if length is not None and (type(length) is not int or length < 1):
        raise UserError(f"row_length is {length!r}, which is not a number of slots")
    if ("files" in source) != ("model_type" in source):
        raise UserError("files and model_type go together")
    if "files" not in source:
        return
    if not isinstance(source["model_type"], str):
        raise UserError(f"model_type is {source['model_type']!r}, which is not a string")
    files = from_json(_SourceFiles, {"files": source["files"]}).files
    names = [plain_name(file.name, "files") for file in files]
    tensors = [tensor for file in files for tensor, _ in file.tensors]
    for what in (names, tensors):
        if len(set(what)) < len(what):
            raise UserError(f"{next(name for name in what if what.count(name) > 1)!r} is listed twice in files")
    if wrong := [name for name in names if not name.endswith(".safetensors")]:
        raise UserError(f"{wrong[0]!r} is not the name of a safetensors file")
    for tensor, dtype in (pair for file in files for pair in file.tensors):
        if dtype not in STORED_DTYPES:
            raise UserError(f"{tensor} has dtype {dtype!r}: {nearest(dtype, STORED_DTYPES)}")


def leaf_shapes(folder: Path) -> dict[str, Any]:
    """(shape, dtype) of every leaf, in a nested dict like the model's parameters."""
    names = sorted(path.name for path in (folder / PARAMETERS).glob("*") if (path / "zarr.json").is_file())
    leaves = [name.replace(".", "/") for name in names]
    handles = {leaf: read_leaf(folder, leaf) for leaf in leaves}
    return nest({leaf: LeafInfo(tuple(h.shape), np.dtype(h.dtype.numpy_dtype)) for leaf, h in handles.items()}, "/")


def read_leaf(folder: Path, leaf: str) -> tensorstore.TensorStore:
    """A handle on one array: `handle[slices].read().result()` is a NumPy array.

    Reading a missing or damaged chunk raises ValueError; it never returns zeros.

    Raises:
        UserError: if the leaf does not exist or cannot be read.
    """
    try:
        return tensorstore.open(_spec(folder, leaf) | {"fill_missing_data_reads": False}, open=True).result()
    except ValueError as error:
        raise UserError(f"{folder}: parameter {leaf} cannot be read ({str(error)[:200]})") from None


def write_chunk(handle: tensorstore.TensorStore) -> tuple[int, ...]:
    """Shape of an array's chunks; slices of whole chunks are the fastest to read and write."""
    shape = handle.chunk_layout.write_chunk.shape
    assert shape is not None, "arrays of model folders have a regular chunk grid"
    return tuple(int(size or 1) for size in shape)


def copy_leaf(origin: tensorstore.TensorStore, target: tensorstore.TensorStore) -> None:
    """Copies an array one chunk at a time: reading across chunks would read each of them in full."""
    steps = [range(0, size, chunk) for size, chunk in zip(target.shape, write_chunk(target), strict=True)]
    for corner in itertools.product(*steps):
        chunk = tuple(
            slice(start, min(start + step.step, step.stop)) for start, step in zip(corner, steps, strict=True)
        )
        target[chunk].write(origin[chunk].read().result()).result()


def _spec(folder: Path, leaf: str) -> dict[str, Any]:
    path = folder.resolve() / PARAMETERS / leaf.replace("/", ".")
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}


def _chunk(shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> list[int]:
    """Chunk shape: one layer, halved along its longest axis until it is at most `CHUNK_BYTES`."""
    chunk = [1, *shape[1:]] if stacked else list(shape)
    while math.prod(chunk) * dtype.itemsize > CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return chunk
