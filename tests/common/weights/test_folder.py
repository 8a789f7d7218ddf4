import json
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from common.errors import UserError
from common.weights import folder
from common.weights.folder import leaf_shapes, new_folder, read_leaf, read_manifest, write_chunk, write_folder

TREE = {
    "embedding": {"table_VD": np.arange(12, dtype=np.float16).reshape(4, 3)},
    "layers": {"norm": {"scale_D": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)}},
}


def write(path):
    with write_folder(path) as writer:
        writer.manifest(model={"kind": "tiny"}, text={"tokenizer": None}, source={"format": "none"})
        writer.write_tree(TREE, stacked=("layers",))
    return path


def test_a_written_folder_reads_back(tmp_path):
    path = write(tmp_path / "deep" / "model")
    manifest = read_manifest(path)
    assert (manifest["model"], manifest["source"]) == ({"kind": "tiny"}, {"format": "none"})
    shapes = leaf_shapes(path)
    assert shapes["embedding"]["table_VD"] == ((4, 3), np.dtype("float16"))
    assert shapes["layers"]["norm"]["scale_D"] == ((2, 3), np.dtype(ml_dtypes.bfloat16))
    handle = read_leaf(path, "layers/norm/scale_D")
    assert np.array_equal(handle[1, 1:].read().result(), TREE["layers"]["norm"]["scale_D"][1, 1:])
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["model"]


def test_a_layer_is_one_chunk_and_a_large_layer_several(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "CHUNK_BYTES", 100)
    with write_folder(tmp_path / "model") as writer:
        small = writer.create("layers/a_D", (3, 20), np.dtype("float32"), stacked=True)
        large = writer.create("layers/b_DF", (3, 7, 30), np.dtype("float32"), stacked=True)
        plain = writer.create("table_VD", (50, 2), np.dtype("float32"), stacked=False)
    assert (write_chunk(small), write_chunk(large), write_chunk(plain)) == ((1, 20), (1, 4, 4), (7, 2))


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    def broken():
        with write_folder(tmp_path / "model") as writer:
            writer.write_tree(TREE, stacked=("layers",))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken()
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, signal, sys
from common.weights.folder import write_folder

with write_folder(pathlib.Path(sys.argv[1])) as writer:
    writer.manifest(model={}, text={}, source={})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_removes_what_a_killed_process_left(tmp_path):
    """Whatever its name. A folder whose writer is alive stays, and the error names it."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], check=False)
    (left,) = tmp_path.iterdir()
    assert killed.returncode == -signal.SIGKILL and (left / "model.json").is_file()
    with new_folder(tmp_path / "slow") as slow:
        write(tmp_path / "model")
        assert not left.exists() and slow.is_dir()
        with pytest.raises(UserError, match="slow is being written by another process"), new_folder(tmp_path / "slow"):
            pytest.fail("the block was entered")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "slow"}
    assert list((tmp_path / "slow").iterdir()) == []


def test_an_existing_folder_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="exists"), new_folder(tmp_path / "model"):
        pytest.fail("the block was entered")


def test_an_unwritable_parent_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), new_folder(tmp_path / "file" / "model"):
        pytest.fail("the block was entered")


def test_a_damaged_or_missing_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a model folder"):
        read_manifest(tmp_path)
    for text, message in [
        ("{", "cannot be read"),
        ("[]", "schema None"),
        (json.dumps({"schema_version": 99}), "schema 99"),
        (json.dumps({"schema_version": 1, "model": {}}), "lacks text, source"),
    ]:
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_manifest(tmp_path)


def test_a_missing_chunk_is_an_error_and_never_zeros(tmp_path):
    path = write(tmp_path / "model")
    (next((path / "parameters" / "embedding.table_VD" / "c").rglob("0/0"))).unlink()
    with pytest.raises(ValueError, match="missing"):
        read_leaf(path, "embedding/table_VD").read().result()
    with pytest.raises(UserError, match=r"layers/none"):
        read_leaf(path, "layers/none")


def test_zeros_are_stored(tmp_path):
    with write_folder(tmp_path / "model") as writer:
        writer.write_tree({"a_D": np.zeros(3, np.float32), "b_D": np.full(3, -0.0, np.float32)}, stacked=())
    assert np.array_equal(read_leaf(tmp_path / "model", "a_D").read().result(), np.zeros(3))
    assert np.signbit(read_leaf(tmp_path / "model", "b_D").read().result()).all()
