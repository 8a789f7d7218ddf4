"""Conversions from one family to the other."""

import numpy as np
import pytest

from common.errors import UserError
from common.weights.folder import read_manifest
from tests.common.weights import foreign
from tests.common.weights.foreign import GPT2, LLAMA
from tests.experiments.models.conversions import MODELS, config_of, leaves, module_shapes, run


def test_the_relaxed_rung_has_the_same_weights_and_converts_back_to_the_same_bytes(tmp_path):
    for name, config, make in (("gpt2", GPT2, foreign.gpt2), ("llama", LLAMA, foreign.llama)):
        source = foreign.write_hugging_face(tmp_path / name, config, make(config))
        at = tmp_path / f"{name}-ours"
        run(source, at)
        run(at, at / ".." / f"{name}-relaxed", to="t5like", rung=4)
        run(tmp_path / f"{name}-relaxed", tmp_path / f"{name}-back", to="gpt")
        assert config_of(tmp_path / f"{name}-back") == config_of(at)
        run(tmp_path / f"{name}-back", tmp_path / f"{name}-out", to="hf")
        assert foreign.read_hugging_face(tmp_path / f"{name}-out") == foreign.read_hugging_face(source)


@pytest.mark.parametrize("rung", range(5))
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied"])
def test_every_rung_has_the_models_parameters(tmp_path, name, rung):
    config, make = MODELS[name]
    run(foreign.write_hugging_face(tmp_path / "in", config, make(config)), tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "other", to="t5like", rung=rung)
    ours, other = leaves(tmp_path / "ours"), leaves(tmp_path / "other")
    assert {leaf: x.shape for leaf, x in other.items()} == module_shapes(config_of(tmp_path / "other"))
    assert np.array_equal(other["decoder/attention/key_DGC"], ours["layers/attention/key_DGC"])
    if rung == 0:
        assert np.array_equal(other["decoder/cross_attention/key_DGC"], ours["layers/attention/key_DGC"])
        assert np.array_equal(other["decoder/cross_norm/scale_D"], ours["layers/attention_norm/scale_D"])
        assert np.array_equal(other["encoder_norm/scale_D"], ours["final_norm/scale_D"])
        assert np.array_equal(other["encoder/mlp/out_FD"], ours["layers/mlp/out_FD"])
    if rung < 3:
        with pytest.raises(UserError, match="only a t5like with"):
            run(tmp_path / "other", tmp_path / "back", to="gpt")


def test_files_of_the_source_are_copied(tmp_path):
    files = {"tokenizer.json": "{}", "generation_config.json": "{}"}
    source = foreign.write_hugging_face(tmp_path / "in", LLAMA, foreign.llama(), files=files)
    run(source, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "other", to="t5like")
    assert {path.name for path in (tmp_path / "other" / "source").iterdir()} == {*files, "config.json"}
    assert read_manifest(tmp_path / "other")["text"] == read_manifest(tmp_path / "ours")["text"]
