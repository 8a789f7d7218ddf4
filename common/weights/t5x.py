"""T5X checkpoints: a folder with a msgpack index named `checkpoint` and one zarr array for each large parameter.

Layout: Roberts et al. 2022, "Scaling Up Models and Data with t5x and seqio" (https://arxiv.org/abs/2203.17189), and its
`checkpoints.py`: leaves of the index are arrays, or tensorstore specs whose paths are relative to the folder. Scanned
models stack layers along axis 1 of `encoder/encoder/...` and `decoder/decoder/...`; they are shown here layer by layer,
as `encoder/layers_0/...`.
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
_STACKED = re.compile(r"((?:^|.*/)(encoder|decoder))/\2/(.+)")


class T5XArray(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    name: str
    """In the index."""
    layer: int | None
    """Which slice of a stacked array; None where layers are apart."""


class T5XCheckpoint:
    """The parameters of a T5X checkpoint, optimizer state left out; a `common.weights.mapping.Checkpoint`.

    Raises:
        UserError: where the folder is none, or an array cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)
        self._target = flatten(_target(folder), "/")
        self._handles: dict[str, tensorstore.TensorStore] = {}
        self.tensors = dict(self._contents())
        self._held: tuple[str, np.ndarray] | None = None

    @property
    def scanned(self) -> bool:
        return any(stored.layer is not None for stored in self.tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        stored = self.tensors[name]
        if stored.layer is None:
            return self._rows(stored.name, start, stop)
        # Chunks hold all layers: a stacked array is read once, and kept until another is asked for.
        if self._held is None or self._held[0] != stored.name:
            self._held = None
            self._held = (stored.name, self._rows(stored.name, 0, None))
        return np.take(self._held[1], stored.layer, axis=SCAN_AXIS)[start:stop]

    def _rows(self, name: str, start: int, stop: int | None) -> np.ndarray:
        if name not in self._handles:
            return np.asarray(self._target[name])[start:stop]
        handle = self._handles[name]
        stop = handle.shape[0] if stop is None else min(stop, handle.shape[0])
        try:
            return handle[start:stop].read().result()
        except ValueError as error:
            raise UserError(f"{self.where}: {name} cannot be read ({str(error)[:200]})") from None

    def _contents(self) -> Iterator[tuple[str, T5XArray]]:
        for name, value in self._target.items():
            shape, dtype = self._shape(name, value)
            stacked = _STACKED.fullmatch(name)
            if stacked is None:
                yield name, T5XArray(shape, dtype, name, None)
                continue
            if len(shape) <= SCAN_AXIS:
                raise UserError(f"{self.where}: {name} is {list(shape)}: layers should be stacked on axis {SCAN_AXIS}")
            one = (*shape[:SCAN_AXIS], *shape[SCAN_AXIS + 1 :])
            for layer in range(shape[SCAN_AXIS]):
                yield f"{stacked[1]}/layers_{layer}/{stacked[3]}", T5XArray(one, dtype, name, layer)

    def _shape(self, name: str, value: Any) -> tuple[tuple[int, ...], np.dtype]:
        if not isinstance(value, _Spec):
            try:
                array = np.asarray(value)
            except ValueError:  # lists of unequal lengths
                raise UserError(f"{self.where}: {name} is no array") from None
            return array.shape, array.dtype
        handle = self._handles[name] = _open(self.folder, value)
        return tuple(handle.shape), np.dtype(handle.dtype.numpy_dtype)


class _Spec(NamedTuple):
    driver: str
    path: str


def is_checkpoint(folder: Path) -> bool:
    return (folder / INDEX).is_file() or any(folder.glob("target.*/.zarray"))


def _target(folder: Path) -> dict[str, Any]:
    """The tree of parameters: arrays and specs."""
    if not (folder / INDEX).is_file():  # arrays without an index
        paths = {path.parent.name for path in folder.glob("target.*/.zarray")}
        return {path.removeprefix("target.").replace(".", "/"): _Spec("zarr", path) for path in paths}
    try:
        contents = serialization.msgpack_restore((folder / INDEX).read_bytes())
        target = contents["optimizer"]["target"]
    except (KeyError, TypeError):
        raise UserError(f"{folder / INDEX} is no T5X index: it has no optimizer/target") from None
    except Exception as error:  # whatever msgpack and its array extension make of damaged bytes
        raise UserError(f"{folder / INDEX} is no T5X index ({error})") from None
    if not isinstance(target, Mapping):
        raise UserError(f"{folder / INDEX} is no T5X index: its optimizer/target holds no arrays")
    return _with_specs(target, folder)


def _with_specs(value: Any, folder: Path) -> Any:
    if not isinstance(value, Mapping):
        return value
    if {"driver", "kvstore"} <= set(value):
        # Old tensorstores had the path beside the kvstore; the bucket that was written to does not matter here.
        store = value["kvstore"]
        path = store.get("path", value.get("path")) if isinstance(store, Mapping) else None
        if not isinstance(path, str) or value["driver"] != "zarr":
            raise UserError(f"{folder / INDEX}: {value} is no zarr array of this folder")
        return _Spec(value["driver"], path.rstrip("/"))
    return {key: _with_specs(inner, folder) for key, inner in value.items()}


def _open(folder: Path, spec: _Spec) -> tensorstore.TensorStore:
    path = folder.resolve() / plain_name(spec.path, str(folder / INDEX))
    try:
        store = {"driver": spec.driver, "kvstore": {"driver": "file", "path": f"{path}/"}}
        handle = tensorstore.open(store, open=True, read=True).result()
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({str(error)[:200]})") from None
    return handle
