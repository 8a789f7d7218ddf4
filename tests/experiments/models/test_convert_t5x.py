"""T5X checkpoints."""

import json

import numpy as np
import pytest

from common.errors import UserError
from tests.common.weights import foreign
from tests.experiments.models.conversions import leaves, run


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("tied", "gated"), [(True, False), (False, True)])
def test_t5x_and_hugging_face_folders_of_one_model_become_the_same(tmp_path, tied, gated, stacked):
    """The key maps of both formats lead to the same leaves."""
    theirs = foreign.t5x(tied=tied, gated=gated)
    written = foreign.scanned(theirs) if stacked else theirs
    remarks = run(foreign.write_t5x(tmp_path / "t5x", written), tmp_path / "ours")
    assert any("assumed" in remark for remark in remarks)
    assert any("d_model=12" in remark for remark in remarks)
    run(tmp_path / "ours", tmp_path / "hf", to="hf")
    found = {
        name: np.frombuffer(data, np.float32).reshape(shape)
        for name, (_, shape, data) in foreign.read_hugging_face(tmp_path / "hf").items()
    }
    # T5X transposes every kernel.
    block = "decoder.block.2.layer."
    for key, value in {
        "shared.weight": theirs["token_embedder/embedding"],
        f"{block}1.EncDecAttention.k.weight": theirs["decoder/layers_2/encoder_decoder_attention/key/kernel"].T,
        f"{block}1.layer_norm.weight": theirs["decoder/layers_2/pre_cross_attention_layer_norm/scale"],
        f"{block}2.DenseReluDense.wo.weight": theirs["decoder/layers_2/mlp/wo/kernel"].T,
        "encoder.block.1.layer.0.SelfAttention.o.weight": theirs["encoder/layers_1/attention/out/kernel"].T,
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": theirs[
            "encoder/relpos_bias/rel_embedding"
        ].T,
        "decoder.final_layer_norm.weight": theirs["decoder/decoder_norm/scale"],
    }.items():
        assert np.array_equal(found[key], value), key
    assert ("lm_head.weight" in found) != tied
    run(tmp_path / "hf", tmp_path / "again")
    assert all(np.array_equal(leaves(tmp_path / "again")[leaf], x) for leaf, x in leaves(tmp_path / "ours").items())


def test_t5x_with_a_named_size(tmp_path):
    source = foreign.write_t5x(tmp_path / "t5x", foreign.t5x(tied=True, gated=False))
    with pytest.raises(UserError, match="is not a size of t5like: did you mean 't5-v1.1-small'"):
        run(source, tmp_path / "ours", config_name="t5-v1-small")
    with pytest.raises(
        UserError,
        match="71 missing: decoder/layers_3/.* and 51 more; 60 of another shape: decoder/decoder_norm",
    ):
        run(source, tmp_path / "ours", config_name="t5-v1.0-small")
    assert [path.name for path in tmp_path.iterdir()] == ["t5x"]


def test_a_tokenizer_is_added_to_t5x(tmp_path):
    """The checkpoint has none; --tokenizer adds a file, anything else is a one-line error."""
    source = foreign.write_t5x(tmp_path / "t5x", foreign.t5x(tied=True, gated=False))
    (tmp_path / "pieces.model").write_bytes(b"a model")
    with pytest.raises(UserError, match="nowhere.model is not a file"):
        run(source, tmp_path / "ours", tokenizer=tmp_path / "nowhere.model")
    run(source, tmp_path / "ours", tokenizer=tmp_path / "pieces.model")
    described = json.loads((tmp_path / "ours" / "model.json").read_text())["text"]["tokenizer"]
    assert described == {"kind": "sentencepiece", "file": "source/pieces.model", "sentinels": 100}
    assert (tmp_path / "ours" / described["file"]).read_bytes() == b"a model"
    with pytest.raises(UserError, match="--tokenizer is for T5X checkpoints"):
        run(tmp_path / "ours", tmp_path / "more", to="hf", tokenizer=tmp_path / "pieces.model")


def test_a_folder_of_checkpoints_is_an_error_that_lists_them(tmp_path):
    foreign.write_t5x(tmp_path / "run" / "checkpoint_100", foreign.t5x(tied=True, gated=False))
    with pytest.raises(UserError, match="it holds checkpoints: checkpoint_100"):
        run(tmp_path / "run", tmp_path / "ours")
