"""Copies weights between a foreign checkpoint and a model folder, a block of rows at a time."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from common.errors import UserError
from common.trees import flatten
from common.weights.folder import DTYPES, SOURCE, FolderWriter, LeafInfo, leaf_shapes, read_leaf, write_chunk
from common.weights.mapping import Checkpoint, Match, Piece, StoredTensor, Table, refuse_keys
from common.weights.safetensors_files import SafetensorsFile, SafetensorsFolder, TensorToWrite, plan_files

BLOCK_BYTES = 128 * 2**20
"""Bytes read at a time; the transposed copy and the write buffer need as much again."""
EXTRAS = "extras"
"""The folder under `source/` that keeps tensors which are not parameters, as safetensors."""

Advance = Callable[[int], None]


def import_weights(table: Table, found: Match, checkpoint: Checkpoint, writer: FolderWriter, advance: Advance) -> None:
    """Writes every leaf of `table` to a model folder; calls `advance(1)` after each stored tensor.

    A leaf whose layers are stored in different dtypes gets a dtype that represents all of them exactly.

    Raises:
        UserError: if an alias differs from the tensor that it copies, or an extra tensor fails its check.
    """
    for alias, name in found.aliases.items():
        if not same_bytes(checkpoint, alias, name):
            raise UserError(f"{checkpoint.where}: {alias} should be a copy of {name}, but differs from it")
    _import_extras(table, found.extras, checkpoint, writer)
    dtypes = _leaf_dtypes(found, checkpoint)
    shapes, handles = table.leaves(), {}
    for name, tensor in found.tensors.items():
        for piece in tensor.pieces:
            leaf = piece.rule.leaf
            if leaf not in handles:
                stacked = piece.layer is not None
                handles[leaf] = writer.create(leaf, shapes[leaf], dtypes[leaf], stacked=stacked)
        for start, stop in _blocks(tensor, checkpoint.tensors[name].dtype.itemsize, handles):
            block = checkpoint.read(name, start, stop)
            for piece in tensor.pieces:
                columns = block[..., piece.offset : piece.offset + piece.shape[-1]]
                part = piece.to_leaf(columns).astype(dtypes[piece.rule.leaf], copy=False)
                handles[piece.rule.leaf][_leaf_slice(piece, start, stop)].write(part).result()
        advance(1)


def export_weights(
    table: Table, folder: Path, destination: Path, source: Mapping[str, Any], advance: Advance
) -> dict[str, Any] | None:
    """Writes a model folder's leaves as safetensors into `destination`; calls `advance(1)` after each tensor.

    If `source` (of model.json) lists the files that the leaves came from, those files are reproduced: the same names,
    order, dtypes, aliases and extra tensors. Returns the index of the files if the caller must write one.

    Raises:
        UserError: listing leaves that are missing, unexpected or of a wrong shape.
    """
    leaves = check_leaves(folder, table)
    tensors = {name: tensor for tensor in table.tensors().values() for name in tensor.names}
    extras = _Extras(folder)
    files, metadata, index = _plan_files(table, leaves, tensors, extras, source)
    handles = {leaf: read_leaf(folder, leaf) for leaf in leaves}
    for name, planned in files:
        with (destination / name).open("wb") as out:
            file = SafetensorsFile(out, planned, metadata.get(name))
            for one in planned:
                blocks = extras.blocks(one) if one.key in extras else _foreign_rows(one, tensors[one.key], handles)
                file.write(one, blocks)
                advance(1)
    return index


def same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two stored tensors have equal dtypes, shapes and bytes."""
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if a.dtype != b.dtype or tuple(a.shape) != tuple(b.shape):
        return False
    rows = a.shape[0] if a.shape else 1
    step = max(1, BLOCK_BYTES // max(1, a.dtype.itemsize * _row_elements(a.shape)))
    return all(
        checkpoint.read(one, start, start + step).tobytes() == checkpoint.read(other, start, start + step).tobytes()
        for start in range(0, rows, step)
    )


def common_dtype(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The narrowest floating-point dtype that represents every value of all `dtypes` exactly.

    >>> common_dtype([np.dtype("float16"), np.dtype("float16")])
    dtype('float16')
    >>> common_dtype([np.dtype("float16"), np.dtype("bfloat16")])
    dtype('float32')
    """
    kinds = set(dtypes)
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype("float64") if np.dtype("float64") in kinds else np.dtype("float32")


def _leaf_dtypes(found: Match, checkpoint: Checkpoint) -> dict[str, np.dtype]:
    dtypes: dict[str, list[np.dtype]] = {}
    for name, tensor in found.tensors.items():
        dtype = np.dtype(checkpoint.tensors[name].dtype)
        if dtype.name not in DTYPES:
            raise UserError(f"{checkpoint.where}: {name} is {dtype.name}; parameters may be {', '.join(DTYPES)}")
        for piece in tensor.pieces:
            dtypes.setdefault(piece.rule.leaf, []).append(dtype)
    return {leaf: common_dtype(stored) for leaf, stored in dtypes.items()}


def _row_elements(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _blocks(
    tensor: StoredTensor, itemsize: int, handles: Mapping[str, tensorstore.TensorStore] | None = None
) -> Iterator[tuple[int, int]]:
    """Yields ranges of foreign rows of about `BLOCK_BYTES` each.

    Each range covers a whole number of the leaf's entries and, given the leaves' `handles`, of its stored chunks.
    """
    piece, shape = tensor.pieces[0], tensor.shape
    if len(tensor.pieces) > 1 and len(shape) == 1:  # parts lie side by side along the only axis
        yield 0, shape[0]
        return
    row_bytes = max(1, itemsize * _row_elements(shape) * piece.row_size)
    entries = max(1, BLOCK_BYTES // row_bytes)
    if handles is not None:
        axis = piece.row_axis + (piece.layer is not None)
        chunk = write_chunk(handles[piece.rule.leaf])[axis]
        entries = max(chunk, entries // chunk * chunk)
    step = entries * piece.row_size
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _leaf_slice(piece: Piece, start: int, stop: int) -> tuple[Any, ...]:
    """The slice of a leaf that foreign rows `start:stop` correspond to."""
    layer = () if piece.layer is None else (piece.layer,)
    before = (slice(None),) * piece.row_axis
    if piece.rule.part is not None and len(piece.shape) == 1:
        return layer or (slice(None),)
    return (*layer, *before, slice(start // piece.row_size, stop // piece.row_size))


def _foreign_rows(
    planned: TensorToWrite, tensor: StoredTensor, handles: Mapping[str, tensorstore.TensorStore]
) -> Iterator[np.ndarray]:
    """Yields the rows of a foreign tensor in blocks, put together from the leaves that it holds."""
    for start, stop in _blocks(tensor, planned.dtype.itemsize):
        parts = [
            piece.to_foreign(handles[piece.rule.leaf][_leaf_slice(piece, start, stop)].read().result())
            for piece in tensor.pieces
        ]
        yield np.concatenate([part.astype(planned.dtype, copy=False) for part in parts], axis=-1)


# Extra tensors, which are not parameters.


def _import_extras(table: Table, names: Sequence[str], checkpoint: Checkpoint, writer: FolderWriter) -> None:
    """Checks the extra tensors and keeps them in the model folder."""
    if not names:
        return
    planned = [
        TensorToWrite(name, tuple(checkpoint.tensors[name].shape), checkpoint.tensors[name].dtype) for name in names
    ]
    (writer.path / SOURCE / EXTRAS).mkdir(parents=True)
    with (writer.path / SOURCE / EXTRAS / "model.safetensors").open("wb") as out:
        file = SafetensorsFile(out, planned, None)
        for one in planned:
            value = checkpoint.read(one.key)
            extra = table.extra(one.key)
            assert extra is not None, f"{one.key} matches no extra"
            if complaint := extra.check(one.key, value):
                raise UserError(f"{checkpoint.where}: {one.key} {complaint}")
            file.write(one, iter([value]))


class _Extras:
    """The tensors that `_import_extras` kept in a model folder; empty if there are none."""

    def __init__(self, folder: Path):
        path = folder / SOURCE / EXTRAS
        self._file = SafetensorsFolder(path) if path.is_dir() else None

    def __contains__(self, name: str) -> bool:
        return self._file is not None and name in self._file.tensors

    def plan(self, name: str) -> TensorToWrite:
        """The entry of a kept tensor in a file to be written."""
        assert self._file is not None, f"{name} is not kept"
        entry = self._file.tensors[name]
        return TensorToWrite(name, entry.shape, entry.dtype)

    def blocks(self, planned: TensorToWrite) -> Iterator[np.ndarray]:
        """Yields the rows of a kept tensor, in one block."""
        assert self._file is not None, f"{planned.key} is not kept"
        yield self._file.read(planned.key)


# Planning the files to write.


def check_leaves(folder: Path, table: Table) -> dict[str, LeafInfo]:
    """The leaves of a model folder; raises UserError listing those that do not match the table."""
    leaves: dict[str, LeafInfo] = flatten(leaf_shapes(folder), "/")
    expected = table.leaves()
    misshapen = [
        f"{leaf} is {list(leaves[leaf].shape)}, expected {list(shape)}"
        for leaf, shape in expected.items()
        if leaf in leaves and leaves[leaf].shape != shape
    ]
    missing = [leaf for leaf in expected if leaf not in leaves]
    refuse_keys(str(folder), missing, [leaf for leaf in leaves if leaf not in expected], misshapen)
    return leaves


def _plan_files(
    table: Table,
    leaves: Mapping[str, LeafInfo],
    tensors: Mapping[str, StoredTensor],
    extras: _Extras,
    source: Mapping[str, Any],
) -> tuple[list[tuple[str, list[TensorToWrite]]], dict[str, Mapping[str, str]], dict[str, Any] | None]:
    """Returns (files and their tensors, each file's metadata, the index)."""
    if "files" not in source:
        fresh = [TensorToWrite(t.key, t.shape, _leaves_dtype(t, leaves)) for t in table.tensors().values()]
        files, index = plan_files(fresh)
        # Transformers expects this entry, which names the framework that wrote the file.
        return files, {name: {"format": "pt"} for name, _ in files}, index
    recorded = {key: np.dtype(dtype) for file in source["files"] for key, dtype in file["tensors"]}
    _check_names(table, recorded, tensors, extras)
    imported = _recorded_leaf_dtypes(recorded, tensors)

    def plan(key: str) -> TensorToWrite:
        if key in extras:
            return extras.plan(key)
        # A leaf whose dtype is not the one it was imported with has been trained since; keep its full precision.
        unchanged = all(imported[piece.rule.leaf] == leaves[piece.rule.leaf].dtype for piece in tensors[key].pieces)
        dtype = recorded[key] if unchanged else _leaves_dtype(tensors[key], leaves)
        return TensorToWrite(key, tensors[key].shape, dtype)

    files = [(file["name"], [plan(key) for key, _ in file["tensors"]]) for file in source["files"]]
    return files, {file["name"]: file["metadata"] or {} for file in source["files"]}, None


def _check_names(
    table: Table, recorded: Mapping[str, np.dtype], tensors: Mapping[str, StoredTensor], extras: _Extras
) -> None:
    """Raises UserError unless the recorded files hold exactly the table's tensors and the kept extras."""
    missing = [t.key for t in table.tensors().values() if not any(name in recorded for name in t.names)]
    unexpected = [name for name in recorded if name not in tensors and name not in extras]
    refuse_keys("the source recorded in model.json", missing, unexpected, [])


def _leaves_dtype(tensor: StoredTensor, leaves: Mapping[str, LeafInfo]) -> np.dtype:
    """The dtype that represents all leaves of a tensor exactly."""
    return common_dtype([leaves[piece.rule.leaf].dtype for piece in tensor.pieces])


def _recorded_leaf_dtypes(recorded: Mapping[str, np.dtype], tensors: Mapping[str, StoredTensor]) -> dict[str, np.dtype]:
    """The dtype that `import_weights` gave each leaf."""
    dtypes: dict[str, list[np.dtype]] = {}
    for key, dtype in recorded.items():
        for piece in tensors[key].pieces if key in tensors else ():
            dtypes.setdefault(piece.rule.leaf, []).append(dtype)
    return {leaf: common_dtype(stored) for leaf, stored in dtypes.items()}
