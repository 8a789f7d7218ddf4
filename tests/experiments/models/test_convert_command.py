"""`twinstack convert`: what it takes and refuses, and that a failure leaves no files."""

import json

import numpy as np
import pytest

from common.errors import UserError
from common.weights.folder import read_manifest, write_folder
from experiments.cli.main import main
from tests.common.weights import foreign
from tests.common.weights.foreign import GPT2, LLAMA
from tests.experiments.models.conversions import config_of, leaves, round_trip, run


def test_wrong_keys_end_with_status_2_and_leave_no_files(tmp_path, capsys):
    tensors = foreign.llama()
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T.copy()
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((20, 12), np.float32)
    source = foreign.write_hugging_face(tmp_path / "in", LLAMA, tensors)
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;" in line
    assert "1 unexpected: model.layers.3.mlp.up_proj.weight;" in line
    assert "model.layers.0.mlp.up_proj.weight is [12, 20], expected [20, 12]" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_command_line(tmp_path, capsys):
    source = foreign.write_hugging_face(tmp_path / "in", GPT2, foreign.gpt2())
    assert main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert "gpt with" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "other"), "--to", "t5like", "--rung", "2"]) == 0
    assert config_of(tmp_path / "other").parameters == "shared"
    for arguments, message in [
        (["--to", "hf"], "exists"),
        (["--to", "huggingface"], "--to huggingface: valid: gpt, hf, t5like"),
        (["--to", "gpt"], "the model is a gpt already"),
        ([], "is a model folder: add --to"),
        (["--to", "hf", "--rung", "1"], "--rung is for --to t5like"),
        (["--to", "t5like", "--rung", "7"], "--rung is 7: it must be at most 4"),
        (["--to", "hf", "--config", "gpt2-small"], "--config is for T5X"),
    ]:
        assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "other"), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_pickles_and_other_sources_are_errors(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps(GPT2))
    for source, message in [
        (tmp_path / "a", "has no model.safetensors"),
        (tmp_path / "none", "is not a folder"),
        (tmp_path / "a" / "config.json", "is not a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            run(source, tmp_path / "ours")
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle"):
        run(tmp_path / "a", tmp_path / "ours")
    with pytest.raises(UserError, match="is a pickle"):
        run(tmp_path / "a" / "pytorch_model.bin", tmp_path / "ours")
    source = foreign.write_hugging_face(tmp_path / "b", GPT2 | {"model_type": "gtp2"}, foreign.gpt2())
    with pytest.raises(UserError, match="did you mean 'gpt2'"):
        run(source, tmp_path / "ours")
    assert list(tmp_path.glob(".*")) == []


def test_one_command_converts_a_foreign_checkpoint_further(tmp_path):
    """One command writes the same files as two would, and leaves no intermediate folder."""
    source = foreign.write_t5x(tmp_path / "t5x", foreign.t5x(tied=True, gated=False))
    run(source, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "two", to="hf")
    assert any("read from shapes" in remark for remark in run(source, tmp_path / "one", to="hf"))
    assert foreign.read_hugging_face(tmp_path / "one") == foreign.read_hugging_face(tmp_path / "two")
    with pytest.raises(UserError, match="model.cross_attention is 'separate'"):
        run(source, tmp_path / "other", to="gpt")
    with pytest.raises(UserError, match="exists"):
        run(source, tmp_path / "one", to="hf")
    assert {path.name for path in tmp_path.iterdir()} == {"t5x", "ours", "one", "two"}


def test_a_trained_model_exports_in_its_own_dtype(tmp_path):
    """Float32 leaves are not rounded to the half precision of the original source."""
    ours = round_trip(tmp_path, LLAMA, foreign.llama(dtype=np.float16))
    manifest = read_manifest(ours)
    trained = {leaf: value.astype(np.float32) * np.float32(1.0001) for leaf, value in leaves(ours).items()}
    with write_folder(tmp_path / "trained") as writer:
        writer.manifest(model=manifest["model"], text=manifest["text"], source=manifest["source"])
        for leaf, value in trained.items():
            writer.create(leaf, value.shape, value.dtype, stacked=leaf.startswith("layers")).write(value).result()
    run(tmp_path / "trained", tmp_path / "hf", to="hf")
    dtype, _, data = foreign.read_hugging_face(tmp_path / "hf")["model.norm.weight"]
    assert dtype == "F32"
    assert data == trained["final_norm/scale_D"].tobytes()


def test_a_model_that_the_target_cannot_express_is_an_error(tmp_path):
    run(foreign.write_hugging_face(tmp_path / "in", LLAMA, foreign.llama()), tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "other", to="t5like", rung=3)
    with pytest.raises(UserError, match=r"model.cross_attention is 'merged'"):
        run(tmp_path / "other", tmp_path / "out", to="hf")
    run(tmp_path / "other", tmp_path / "prefix", to="gpt")
    assert config_of(tmp_path / "prefix").input_attention == "bidirectional"
    with pytest.raises(UserError, match=r"model.input_attention is 'bidirectional'"):
        run(tmp_path / "prefix", tmp_path / "out", to="hf")


def test_leaves_that_do_not_fit_the_config_are_listed(tmp_path):
    run(foreign.write_hugging_face(tmp_path / "in", LLAMA, foreign.llama()), tmp_path / "ours")
    manifest = json.loads((tmp_path / "ours" / "model.json").read_text())
    manifest["model"]["num_layers"] = 4
    (tmp_path / "ours" / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"layers/mlp/out_FD is \[3, 20, 12\], expected \[4, 20, 12\]"):
        run(tmp_path / "ours", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()
