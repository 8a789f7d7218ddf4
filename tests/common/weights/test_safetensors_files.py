import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from common.errors import UserError
from common.weights import safetensors_files
from common.weights.safetensors_files import INDEX, SafetensorsFile, SafetensorsFolder, TensorToWrite, plan_files
from tests.common.weights.foreign import BF16

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(4, 3),
    "b": np.arange(4).astype(BF16),
    "c": np.full((), 3, np.float16),
    "d": np.ones((2, 2), np.uint8),
}


def test_reads_slices_with_dtypes(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    folder = SafetensorsFolder(tmp_path)
    assert {name: (x.shape, x.dtype) for name, x in TENSORS.items()} == {
        name: (x.shape, x.dtype) for name, x in folder.tensors.items()
    }
    assert np.array_equal(folder.read("a", 1, 3), TENSORS["a"][1:3])
    assert folder.read("c").shape == ()
    (file,) = folder.files()
    assert (file["name"], file["metadata"]) == ("model.safetensors", {"format": "pt"})
    assert sorted(name for name, _ in file["tensors"]) == sorted(TENSORS)


@pytest.mark.parametrize("metadata", [{"format": "pt"}, None])
def test_writes_the_same_bytes_as_the_library(tmp_path, metadata):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata=metadata)
    order = SafetensorsFolder(tmp_path).files()[0]["tensors"]
    planned = [TensorToWrite(name, TENSORS[name].shape, TENSORS[name].dtype) for name, _ in order]
    with (tmp_path / "ours.safetensors").open("wb") as out:
        file = SafetensorsFile(out, planned, metadata)
        for one in planned:
            rows = np.atleast_1d(TENSORS[one.key])
            file.write(one, iter([rows[:1], rows[1:]]))
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_large_models_are_written_as_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 60)
    planned = [TensorToWrite(name, value.shape, value.dtype) for name, value in TENSORS.items()]
    files, index = plan_files(planned)
    assert index is not None
    assert [name for name, _ in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, tensors in files:
        with (tmp_path / name).open("wb") as out:
            file = SafetensorsFile(out, tensors, {"format": "pt"})
            for one in tensors:
                file.write(one, iter([np.atleast_1d(TENSORS[one.key])]))
        assert set(load_file(tmp_path / name)) == {one.key for one in tensors}
    (tmp_path / INDEX).write_text(json.dumps(index))
    folder = SafetensorsFolder(tmp_path)
    assert all(np.array_equal(folder.read(name), value) for name, value in TENSORS.items())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in TENSORS.values())


def test_wider_dtypes_come_first():
    narrow, wide = TensorToWrite("a", (3,), np.dtype("float16")), TensorToWrite("b", (3,), np.dtype("float32"))
    assert plan_files([narrow, wide])[0] == [("model.safetensors", [wide, narrow])]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../other.safetensors"}, "outside its folder"),
        ({"a": "/etc/other.safetensors"}, "outside its folder"),
        ({"a": ".."}, "outside its folder"),
        ({"a": None}, "outside its folder"),
        ({}, "no weight_map"),
        ({"a": "part.safetensors"}, "1 differ: b"),
        ({"a": "part.safetensors", "b": "part.safetensors", "z": "part.safetensors"}, "1 differ: z"),
        ({"a": "absent.safetensors"}, "absent.safetensors cannot be read"),
    ],
)
def test_an_index_that_does_not_match_the_files_is_refused(tmp_path, weight_map, message):
    save_file({name: TENSORS[name] for name in "ab"}, tmp_path / "part.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        SafetensorsFolder(tmp_path)


def test_broken_files_and_quantised_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="cannot be read"):
        SafetensorsFolder(tmp_path)
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match="w is F8_E4M3"):
        SafetensorsFolder(tmp_path)


def test_a_name_twice_in_a_header_is_refused(tmp_path):
    """Readers disagree on which of the two counts."""
    about = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    first, second = json.dumps(about), json.dumps(about | {"data_offsets": [4, 8]})
    header = f'{{"a": {first}, "a": {second}, "b": {first}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=r"model.safetensors .*(twice|cannot be read)"):
        SafetensorsFolder(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(UserError, match=r"1 differ: a \(two.safetensors\)"):
        SafetensorsFolder(tmp_path)
