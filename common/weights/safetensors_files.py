"""Reads and writes safetensors files in a folder: a single file, or several files with an index.

A file is eight bytes with the header's length, a JSON header of names, dtypes, shapes and offsets, then the tensors.
Tensors are read by slices of rows and written a block at a time.
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
"""NumPy's name of each dtype of the format that models use."""
_CODES = {name: code for code, name in DTYPES.items()}
SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in one file; larger models are written as several files."""


class TensorEntry(NamedTuple):
    """Where a tensor is stored, from a file's header."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str
    offset: int
    """Its first byte in the file."""


class SafetensorsFolder:
    """The tensors of a folder; a `common.weights.mapping.Checkpoint`.

    Raises:
        UserError: if a file is missing or broken, the index and the files disagree, or a dtype is not one of `DTYPES`.
    """

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)
        weight_map = _weight_map(folder)
        names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        self._headers = {name: _read_header(folder / name) for name in names}
        contents = [item for name in names for item in self._contents(name)]
        self.tensors = dict(contents)
        if weight_map is not None:
            in_files = {(key, entry.file) for key, entry in contents}
            if differing := sorted(in_files ^ set(weight_map.items())):
                listed = ", ".join(f"{key} ({file})" for key, file in differing[:20])
                raise UserError(f"{folder / INDEX} does not match the files; {len(differing)} differ: {listed}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of the first axis."""
        entry = self.tensors[name]
        rows = entry.shape[0] if entry.shape else 1
        stop = rows if stop is None else min(stop, rows)
        row_elements = math.prod(entry.shape[1:])
        # The library would read the whole tensor for a slice of it.
        offset = entry.offset + start * row_elements * entry.dtype.itemsize
        flat = np.fromfile(self.folder / entry.file, entry.dtype, (stop - start) * row_elements, offset=offset)
        return flat.reshape((stop - start, *entry.shape[1:]) if entry.shape else ())

    def files(self) -> list[dict[str, Any]]:
        """Name, metadata and tensors of each file, as JSON; tensors are (name, dtype) in the order of their offsets."""
        by_offset = sorted(self.tensors.items(), key=lambda item: item[1].offset)
        return [
            {
                "name": name,
                "metadata": header.get("__metadata__"),
                "tensors": [[key, entry.dtype.name] for key, entry in by_offset if entry.file == name],
            }
            for name, (header, _) in self._headers.items()
        ]

    def _contents(self, name: str) -> Iterator[tuple[str, TensorEntry]]:
        """Yields the tensors of one file."""
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


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and the offset at which the tensors begin."""
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
    """The file of each tensor, from the index; None if there is a single file."""
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
    """Name, shape and dtype of a tensor in a file to be written."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """Writes a file: the header when constructed, then the tensors one by one, each from blocks of its rows."""

    def __init__(self, file: BinaryIO, tensors: Sequence[TensorToWrite], metadata: Mapping[str, str] | None):
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for tensor in tensors:
            start, end = end, end + tensor.nbytes
            code = _CODES[tensor.dtype.name]
            header[tensor.key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = file
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, tensor: TensorToWrite, blocks: Iterator[np.ndarray]) -> None:
        """Appends one tensor; call in the order of the header."""
        written = 0
        for block in blocks:
            assert block.dtype == tensor.dtype, f"{tensor.key}: {block.dtype} for {tensor.dtype}"
            self._file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            written += block.nbytes
        assert written == tensor.nbytes, f"{tensor.key}: {written} bytes for {tensor.nbytes}"


def plan_files(tensors: Sequence[TensorToWrite]) -> tuple[list[tuple[str, list[TensorToWrite]]], dict[str, Any] | None]:
    """Divides tensors over files: (file name, its tensors) for each file, and the index (None for a single file).

    Within a file wider dtypes come first, so that every tensor is aligned.
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
