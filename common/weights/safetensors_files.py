"""Safetensors in a folder: one file, or several named by an index. Read by slices, written a block at a time.

Format: eight bytes with the header's length, a JSON header of names, dtypes, shapes and offsets, then the tensors.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors

from common.errors import UserError
from common.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The format's names of those that models use, and numpy's."""
_NAMES = {name: code for code, name in DTYPES.items()}
SHARD_BYTES = 5 * 10**9
"""Larger models are written as several files."""


class Stored(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    file: str


class SafetensorsFolder:
    """The tensors of a folder; a `common.weights.mapping.Checkpoint`.

    Raises:
        UserError: where a file is absent or broken, the index and the files disagree, or a dtype is none that
            parameters are kept in.
    """

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)
        self._open = contextlib.ExitStack()
        weight_map = _weight_map(folder)
        names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        self._files = {name: self._open.enter_context(_open(folder / name)) for name in names}
        self.tensors = {key: stored for name in names for key, stored in self._contents(name)}
        if weight_map is not None:
            claimed = {key: file for key, file in weight_map.items() if self._file_of(key) != file}
            claimed |= {key: stored.file for key, stored in self.tensors.items() if key not in weight_map}
            if claimed:
                listed = ", ".join(f"{key} ({file})" for key, file in sorted(claimed.items())[:20])
                raise UserError(f"{folder / INDEX} does not say what the files hold; {len(claimed)} differ: {listed}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        stored = self.tensors[name]
        if not stored.shape:
            return self._files[stored.file].get_tensor(name)
        rows = stored.shape[0]
        return self._files[stored.file].get_slice(name)[start : rows if stop is None else min(stop, rows)]

    def files(self) -> list[dict[str, Any]]:
        """Each file's name, metadata and tensors in the order in which they lie, with dtypes: plain JSON."""
        return [
            {
                "name": name,
                "metadata": file.metadata(),
                "tensors": [[key, self.tensors[key].dtype.name] for key in file.offset_keys()],
            }
            for name, file in self._files.items()
        ]

    def close(self) -> None:
        self._open.close()

    def _file_of(self, key: str) -> str | None:
        return self.tensors[key].file if key in self.tensors else None

    def _contents(self, name: str) -> Iterator[tuple[str, Stored]]:
        for key in self._files[name].keys():  # noqa: SIM118  (not a dict)
            one = self._files[name].get_slice(key)
            if one.get_dtype() not in DTYPES:
                raise UserError(
                    f"{self.folder / name}: {key} is {one.get_dtype()} (quantised?); readable: {', '.join(DTYPES)}"
                )
            yield key, Stored(tuple(one.get_shape()), np.dtype(DTYPES[one.get_dtype()]), name)


def _open(path: Path) -> Any:
    try:
        # Read, not mapped: pages of a mapped file would count as this process's memory.
        return safetensors.safe_open(path, framework="np", backend="pread")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file has which tensor; None where there is one file only."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return None
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{folder / INDEX} names a file outside its folder: {file!r}")
    return weight_map


class Planned(NamedTuple):
    """A tensor that is going to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A file whose tensors are written one after the other, each from blocks of its rows."""

    def __init__(self, file: BinaryIO, tensors: Sequence[Planned], metadata: Mapping[str, str] | None):
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for tensor in tensors:
            start, end = end, end + tensor.nbytes
            code = _NAMES[tensor.dtype.name]
            header[tensor.key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = file
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: Planned, blocks: Iterator[np.ndarray]) -> None:
        written = 0
        for block in blocks:
            assert block.dtype == tensor.dtype, f"{tensor.key}: {block.dtype} for {tensor.dtype}"
            self._file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            written += block.nbytes
        assert written == tensor.nbytes, f"{tensor.key}: {written} bytes for {tensor.nbytes}"


def plan_files(tensors: Sequence[Planned]) -> tuple[list[tuple[str, list[Planned]]], dict[str, Any] | None]:
    """(file name, its tensors) and the index, None for a single file.

    Wide dtypes come first in a file, so that every tensor is aligned.
    """
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    shards = [sorted(shard, key=lambda tensor: (-tensor.dtype.itemsize, tensor.key)) for shard in shards]
    if len(shards) == 1:
        return [(SINGLE, shards[0])], None
    files = [(f"model-{i:05}-of-{len(shards):05}.safetensors", shard) for i, shard in enumerate(shards, 1)]
    return files, {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {tensor.key: name for name, shard in files for tensor in shard},
    }
