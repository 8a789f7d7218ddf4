"""Safetensors in a folder: one file, or several named by an index. Read by slices, written a block at a time.

Format: eight bytes with the header's length, a JSON header of names, dtypes, shapes and offsets, then the tensors.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors

from common.errors import UserError
from common.files import plain_name, read_json
from common.json_text import parse_json

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


class TensorEntry(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    offset: int
    """Where it begins in the file, in bytes."""


class SafetensorsFolder:
    """The tensors of a folder; a `common.weights.mapping.Checkpoint`.

    Raises:
        UserError: where a file is absent or broken, the index and the files disagree, or a dtype is none that
            parameters are kept in.
    """

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)
        weight_map = _weight_map(folder)
        names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        self._headers = {name: _header(folder / name) for name in names}
        contents = [item for name in names for item in self._contents(name)]
        self.tensors = dict(contents)
        if weight_map is not None:
            held = {(key, stored.file) for key, stored in contents}
            if differing := sorted(held ^ set(weight_map.items())):
                listed = ", ".join(f"{key} ({file})" for key, file in differing[:20])
                raise UserError(f"{folder / INDEX} does not say what the files hold; {len(differing)} differ: {listed}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        stored = self.tensors[name]
        rows = stored.shape[0] if stored.shape else 1
        stop = rows if stop is None else min(stop, rows)
        row = math.prod(stored.shape[1:])
        # The library would read the whole tensor for a slice of it.
        offset = stored.offset + start * row * stored.dtype.itemsize
        flat = np.fromfile(self.folder / stored.file, stored.dtype, (stop - start) * row, offset=offset)
        return flat.reshape((stop - start, *stored.shape[1:]) if stored.shape else ())

    def files(self) -> list[dict[str, Any]]:
        """Each file's name, metadata and tensors in the order in which they lie, with dtypes: plain JSON."""
        lying = sorted(self.tensors.items(), key=lambda item: item[1].offset)
        return [
            {
                "name": name,
                "metadata": header.get("__metadata__"),
                "tensors": [[key, stored.dtype.name] for key, stored in lying if stored.file == name],
            }
            for name, (header, _) in self._headers.items()
        ]

    def _contents(self, name: str) -> Iterator[tuple[str, TensorEntry]]:
        header, begin = self._headers[name]
        for key, about in header.items():
            if key == "__metadata__":
                continue
            if about["dtype"] not in DTYPES:
                raise UserError(
                    f"{self.folder / name}: {key} is {about['dtype']} (quantised?); readable: {', '.join(DTYPES)}"
                )
            dtype = np.dtype(DTYPES[about["dtype"]])
            yield key, TensorEntry(tuple(about["shape"]), dtype, name, begin + about["data_offsets"][0])


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the first tensor begins."""
    try:
        with safetensors.safe_open(path, framework="np"):  # checks that sizes and offsets fit the file
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(size))
            return header, 8 + size
    except (OSError, ValueError, safetensors.SafetensorError) as error:
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
        plain_name(file, str(folder / INDEX))
    return weight_map


class TensorToWrite(NamedTuple):
    """A tensor that is going to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A file whose tensors are written one after the other, each from blocks of its rows."""

    def __init__(self, file: BinaryIO, tensors: Sequence[TensorToWrite], metadata: Mapping[str, str] | None):
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

    def write(self, tensor: TensorToWrite, blocks: Iterator[np.ndarray]) -> None:
        written = 0
        for block in blocks:
            assert block.dtype == tensor.dtype, f"{tensor.key}: {block.dtype} for {tensor.dtype}"
            self._file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            written += block.nbytes
        assert written == tensor.nbytes, f"{tensor.key}: {written} bytes for {tensor.nbytes}"


def plan_files(tensors: Sequence[TensorToWrite]) -> tuple[list[tuple[str, list[TensorToWrite]]], dict[str, Any] | None]:
    """(file name, its tensors) and the index, None for a single file.

    Wide dtypes come first in a file, so that every tensor is aligned.
    """
    shards: list[list[TensorToWrite]] = [[]]
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
