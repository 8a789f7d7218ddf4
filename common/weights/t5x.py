"""T5X checkpoints: a folder with a msgpack index named `checkpoint` and one zarr array for each large parameter.

Layout: Roberts et al. 2022, "Scaling Up Models and Data with t5x and seqio" (https://arxiv.org/abs/2203.17189), and
T5X's `checkpoints.py`. Leaves of the index are arrays, or tensorstore specs whose paths are relative to the folder.
Scanned models stack layers along axis 1 of `encoder/encoder/...` and `decoder/decoder/...`; this module presents them
layer by layer, as `encoder/layers_0/...`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore
from flax import serialization

from common.errors import UserError
from common.files import plain_name
from common.trees import flatten

INDEX = "checkpoint"
SCAN_AXIS = 1
"""Where scanned models stack their layers."""
SENTINELS = 100
"""Extra ids on top of the SentencePiece model that T5X trains with."""
_STACKED = re.compile(r"((?:^|.*/)(encoder|decoder))/\2/(.+)")


class T5XArray(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    name: str
    """Name in the index."""
    layer: int | None
    """Index into a stacked array; None if the checkpoint stores this layer by itself."""


class T5XCheckpoint:
    """The parameters of a T5X checkpoint, without optimizer state; a `common.weights.mapping.Checkpoint`.

    Raises:
        UserError: if the folder is not a T5X checkpoint, or an array cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)
        self._target = flatten(_read_target(folder), "/")
        self._handles: dict[str, tensorstore.TensorStore] = {}
        self.tensors = dict(self._contents())
        self._last_stacked: tuple[str, np.ndarray] | None = None

    @property
    def scanned(self) -> bool:
        """Whether layers are stored stacked."""
        return any(stored.layer is not None for stored in self.tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of the first axis."""
        array = self.tensors[name]
        if array.layer is None:
            return self._read_rows(array.name, start, stop)
        # Chunks hold all layers, so a stacked array is read once and kept until another one is needed.
        if self._last_stacked is None or self._last_stacked[0] != array.name:
            self._last_stacked = None  # frees the previous array before the next is read
            self._last_stacked = (array.name, self._read_rows(array.name, 0, None))
        return np.take(self._last_stacked[1], array.layer, axis=SCAN_AXIS)[start:stop]

    def _read_rows(self, name: str, start: int, stop: int | None) -> np.ndarray:
        if name not in self._handles:
            return np.asarray(self._target[name])[start:stop]
        handle = self._handles[name]
        stop = handle.shape[0] if stop is None else min(stop, handle.shape[0])
        try:
            return handle[start:stop].read().result()
        except ValueError as error:
            raise UserError(f"{self.where}: {name} cannot be read ({str(error)[:200]})") from None

    def _contents(self) -> Iterator[tuple[str, T5XArray]]:
        """Yields every parameter by name, one layer at a time."""
        for name, value in self._target.items():
            shape, dtype = self._shape(name, value)
            stacked = _STACKED.fullmatch(name)
            if stacked is None:
                yield name, T5XArray(shape, dtype, name, None)
                continue
            if len(shape) <= SCAN_AXIS:
                raise UserError(f"{self.where}: {name} is {list(shape)}: layers should be stacked on axis {SCAN_AXIS}")
            layer_shape = (*shape[:SCAN_AXIS], *shape[SCAN_AXIS + 1 :])
            for layer in range(shape[SCAN_AXIS]):
                yield f"{stacked[1]}/layers_{layer}/{stacked[3]}", T5XArray(layer_shape, dtype, name, layer)

    def _shape(self, name: str, value: Any) -> tuple[tuple[int, ...], np.dtype]:
        if not isinstance(value, _Spec):
            try:
                array = np.asarray(value)
            except ValueError:  # lists of unequal lengths
                raise UserError(f"{self.where}: {name} is not an array") from None
            return array.shape, array.dtype
        handle = self._handles[name] = _open_array(self.folder, value)
        return tuple(handle.shape), np.dtype(handle.dtype.numpy_dtype)


class _Spec(NamedTuple):
    """A tensorstore spec: an array stored in a folder of its own."""

    driver: str
    path: str


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` is a T5X checkpoint, with or without its index."""
    return (folder / INDEX).is_file() or any(folder.glob("target.*/.zarray"))


def _read_target(folder: Path) -> dict[str, Any]:
    """The nested dict of parameters: arrays and `_Spec`s."""
    if not (folder / INDEX).is_file():  # arrays without an index
        paths = {path.parent.name for path in folder.glob("target.*/.zarray")}
        return {path.removeprefix("target.").replace(".", "/"): _Spec("zarr", path) for path in paths}
    try:
        contents = serialization.msgpack_restore((folder / INDEX).read_bytes())
        target = contents["optimizer"]["target"]
    except (KeyError, TypeError):
        raise UserError(f"{folder / INDEX} is not a T5X index: it has no optimizer/target") from None
    except Exception as error:  # msgpack and its array extension raise many types on damaged bytes
        raise UserError(f"{folder / INDEX} is not a T5X index ({error})") from None
    if not isinstance(target, Mapping):
        raise UserError(f"{folder / INDEX} is not a T5X index: its optimizer/target holds no arrays")
    return _with_specs(target, folder)


def _with_specs(value: Any, folder: Path) -> Any:
    """Replaces tensorstore specs in a nested dict by `_Spec`s."""
    if not isinstance(value, Mapping):
        return value
    if {"driver", "kvstore"} <= set(value):
        # Old tensorstores put the path next to the kvstore, not inside it. The original bucket does not matter here.
        store = value["kvstore"]
        path = store.get("path", value.get("path")) if isinstance(store, Mapping) else None
        if not isinstance(path, str) or value["driver"] != "zarr":
            raise UserError(f"{folder / INDEX}: {value} is not a zarr array in this folder")
        return _Spec(value["driver"], path.rstrip("/"))
    return {key: _with_specs(inner, folder) for key, inner in value.items()}


def _open_array(folder: Path, spec: _Spec) -> tensorstore.TensorStore:
    path = folder.resolve() / plain_name(spec.path, str(folder / INDEX))
    try:
        store = {"driver": spec.driver, "kvstore": {"driver": "file", "path": f"{path}/"}}
        handle = tensorstore.open(store, open=True, read=True).result()
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({str(error)[:200]})") from None
    return handle
