"""The model folder: weights, config and what their text is written in, on disk.

    FOLDER/model.json      schema version, the model's config as JSON, text conventions, where the weights come from
    FOLDER/parameters/     one tensorstore (zarr3) array for each leaf, `layers.attention.query_DHC/`, chunked by layer
    FOLDER/source/         files carried along as they are: config.json, tokenizers, tensors that are no parameters

Folders are written under a temporary name and renamed when they are whole. Neither reading nor writing needs more
memory than a chunk: `read_leaf` gives a handle that reads slices, as `jax.make_array_from_callback` wants them.
"""

import contextlib
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
import tensorstore

from common.errors import UserError
from common.files import read_json, write_json
from common.weights.mapping import flatten, nest

SCHEMA_VERSION = 1
MANIFEST = "model.json"
PARAMETERS = "parameters"
SOURCE = "source"
CHUNK_BYTES = 64 * 2**20
"""A layer larger than this is stored in several chunks."""
DTYPES = ("float16", "bfloat16", "float32", "float64")


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
        `bos_id`. `source` says what the weights were made from.
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
        for leaf, value in flatten(tree).items():
            array = np.asarray(value)
            handle = self.create(leaf, array.shape, array.dtype, stacked=leaf.partition("/")[0] in stacked)
            handle.write(array).result()


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A temporary folder that becomes `destination` at the end, or is removed.

    Raises:
        UserError: where something is there already, or its parent cannot be written.
    """
    if destination.exists() or destination.is_symlink():
        raise UserError(f"{destination} exists: name a folder that does not")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f"{destination.name}.tmp-"))
    except OSError as error:
        raise UserError(f"{destination} cannot be written ({error.strerror})") from None
    try:
        temporary.chmod(0o755)
        yield temporary
        os.rename(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
    return manifest


def leaf_shapes(folder: Path) -> dict[str, Any]:
    """Nested dict, as the model's parameters are, of (shape, dtype)."""
    names = sorted(path.name for path in (folder / PARAMETERS).glob("*") if (path / "zarr.json").is_file())
    leaves = [name.replace(".", "/") for name in names]
    handles = {leaf: read_leaf(folder, leaf) for leaf in leaves}
    return nest({leaf: LeafInfo(tuple(h.shape), np.dtype(h.dtype.numpy_dtype)) for leaf, h in handles.items()})


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
