import numpy as np
import pytest
from flax import serialization

from common.errors import UserError
from common.weights.t5x import T5XCheckpoint, is_checkpoint
from tests.common.weights.foreign import scanned, t5x, write_t5x

TENSORS = t5x(tied=False, gated=True)


def equals_tensors(checkpoint):
    return set(checkpoint.tensors) == set(TENSORS) and all(
        np.array_equal(checkpoint.read(name), value)
        and checkpoint.tensors[name].shape == value.shape
        and checkpoint.tensors[name].dtype == value.dtype
        for name, value in TENSORS.items()
    )


@pytest.mark.parametrize("old", [False, True])
def test_layers_stored_one_by_one(tmp_path, old):
    checkpoint = T5XCheckpoint(write_t5x(tmp_path / "c", TENSORS, old=old))
    assert is_checkpoint(tmp_path / "c")
    assert not checkpoint.scanned
    assert equals_tensors(checkpoint)
    rows = checkpoint.read("token_embedder/embedding", 3, 7)
    assert np.array_equal(rows, TENSORS["token_embedder/embedding"][3:7])


@pytest.mark.parametrize("inline", [0, 1000])
def test_stacked_layers_are_read_one_by_one(tmp_path, inline):
    checkpoint = T5XCheckpoint(write_t5x(tmp_path / "c", scanned(TENSORS), inline=inline))
    assert checkpoint.scanned
    assert equals_tensors(checkpoint)
    name = "decoder/layers_2/mlp/wo/kernel"
    assert np.array_equal(checkpoint.read(name, 5, 9), TENSORS[name][5:9])


def test_arrays_without_an_index(tmp_path):
    folder = write_t5x(tmp_path / "c", TENSORS, inline=0)
    (folder / "checkpoint").unlink()
    assert is_checkpoint(folder)
    assert equals_tensors(T5XCheckpoint(folder))


def spec(path, driver="zarr"):
    return {"driver": driver, "kvstore": {"driver": "file", "path": path}, "metadata": {}}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"\x80\x04pickle", "not a T5X index"),
        (serialization.msgpack_serialize({"target": {}}), "no optimizer/target"),
        (serialization.msgpack_serialize({"optimizer": {"target": {"a": spec("../a")}}}), "outside its folder"),
        (serialization.msgpack_serialize({"optimizer": {"target": {"a": spec("/etc")}}}), "outside its folder"),
        (serialization.msgpack_serialize({"optimizer": {"target": {"a": spec("a", "n5")}}}), "not a zarr array"),
        (serialization.msgpack_serialize({"optimizer": {"target": {"a": spec("target.a")}}}), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, contents, message):
    (tmp_path / "checkpoint").write_bytes(contents)
    with pytest.raises(UserError, match=message):
        T5XCheckpoint(tmp_path)
