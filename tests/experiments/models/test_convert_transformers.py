"""Folders that Hugging Face Transformers wrote, and folders for it to read."""

import dataclasses
import io
import os

import numpy as np
import pytest
from rich.console import Console

from common.config import from_json, to_json
from common.infer.score import pair, score
from common.progress import ProgressBars
from common.recipe import GPT2, LLAMA, T5_V1_0, T5_V1_1
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.trees import flatten
from common.weights.folder import leaf_shapes, read_leaf, read_manifest, write_folder
from experiments.families import ModelConfig
from experiments.models.convert import convert
from experiments.models.convert_out import hugging_face_formats
from experiments.models.finding import open_model
from tests.helpers import F32, gpt, t5like

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow
PROGRESS = ProgressBars(Console(file=io.StringIO()))

T5 = {"vocab_size": 96, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
GPT = {"vocab_size": 97, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
LLAMA_SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
THEIRS = {
    "t5-v1.0": ("T5ForConditionalGeneration", "T5Config", T5 | {"num_decoder_layers": 3}, (True, True)),
    "t5-v1.1": ("T5ForConditionalGeneration", "T5Config", T5 | GATED, (True, False)),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5 | GATED, (True, False)),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, (True, False)),
    "gpt2-headless": ("GPT2Model", "GPT2Config", GPT, (True, False)),
    "gpt2-untied": ("GPT2LMHeadModel", "GPT2Config", GPT | {"tie_word_embeddings": False}, (False, False)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA_SIZES | {"rope_theta": 5e5}, (False, False)),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", LLAMA_SIZES | {"tie_word_embeddings": True}, (True, False)),
}


def random_model(name):
    model_class, config_class, sizes, _ = THEIRS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", THEIRS)
def test_a_saved_model_comes_back_identical(tmp_path, name, dtype):
    model = random_model(name).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "ours", PROGRESS)
    convert(tmp_path / "ours", tmp_path / "out", PROGRESS, to="hf")
    back, loading = type(model).from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    # Not the model itself: in half precision Transformers loads T5's `wo` as float32, whatever the file has.
    assert same_state(type(model).from_pretrained(tmp_path / "in", dtype="auto"), back)
    recipe = from_json(ModelConfig, read_manifest(tmp_path / "ours")["model"]).recipe
    assert (recipe.tied_embeddings, recipe.scale_logits) == THEIRS[name][3]


def test_a_separate_head_stays_separate(tmp_path):
    """Transformers ties T5 when it makes a model, but loads a file with a different head untied; so do we."""
    model = random_model("t5-v1.1")
    model.lm_head.weight = torch.nn.Parameter(torch.randn(96, 16))
    model.save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "ours", PROGRESS)
    recipe = from_json(ModelConfig, read_manifest(tmp_path / "ours")["model"]).recipe
    assert (recipe.tied_embeddings, recipe.scale_logits) == (False, False)
    convert(tmp_path / "ours", tmp_path / "out", PROGRESS, to="hf")
    back = type(model).from_pretrained(tmp_path / "out")
    assert not back.config.scale_decoder_outputs
    assert torch.equal(back.lm_head.weight, model.lm_head.weight)
    assert torch.equal(back.shared.weight, model.shared.weight)


OURS = {
    "t5-v1.0": (t5like(T5_V1_0, num_kv_heads=4), "T5ForConditionalGeneration"),
    "t5-v1.1": (t5like(T5_V1_1, num_kv_heads=4), "T5ForConditionalGeneration"),
    "t5-swiglu": (
        t5like(dataclasses.replace(T5_V1_1, mlp="swiglu", norm_epsilon=1e-5), num_kv_heads=4),
        "T5ForConditionalGeneration",
    ),
    "t5-tied-unscaled": (
        t5like(dataclasses.replace(T5_V1_1, tied_embeddings=True), num_kv_heads=4, encoder_layers=3),
        "T5ForConditionalGeneration",
    ),
    "gpt2": (gpt(GPT2, max_positions=16, num_kv_heads=4), "GPT2LMHeadModel"),
    "gpt2-untied": (
        gpt(dataclasses.replace(GPT2, tied_embeddings=False), max_positions=16, num_kv_heads=4),
        "GPT2LMHeadModel",
    ),
    "llama": (gpt(LLAMA, head_dim=16), "LlamaForCausalLM"),
    "llama-tied": (gpt(dataclasses.replace(LLAMA, tied_embeddings=True, rope_theta=3e5)), "LlamaForCausalLM"),
}


def write_random(folder, config, model_type, text):
    rng = np.random.default_rng(0)
    with write_folder(folder) as writer:
        writer.manifest(model=to_json(config), text=text, source={"format": "run"})
        for leaf, shape in hugging_face_formats()[model_type].table(config, ()).leaves().items():
            value = rng.standard_normal(shape).astype(np.float32)
            stacked = leaf.partition("/")[0] in ("layers", "encoder", "decoder")
            writer.create(leaf, value.shape, value.dtype, stacked=stacked).write(value).result()


@pytest.mark.parametrize("ends", [True, False])
def test_the_ids_in_an_exports_remark_score_the_same_in_transformers(tmp_path, ends):
    """Builds the ids as the remark states: inputs, end token if training had one, start token, targets."""
    text = {"tokenizer": None, "alignment": "start_token", "start_id": 0, "eos_ids": [1], "bos_id": None}
    write_random(tmp_path / "ours", OURS["llama"][0], "llama", text | {"eos_after_inputs": ends})
    remarks = convert(tmp_path / "ours", tmp_path / "hf", PROGRESS, to="hf")
    between = "1 (end token), 0 (start token)" if ends else "0 (start token)"
    assert f"one sequence of ids: the inputs, {between}, the targets" in remarks[0]
    loaded = open_model(str(tmp_path / "ours"), F32, make_mesh(MeshShape()))
    targets, inputs = [5, 6, 4], [7, 8, 9, *([1] if ends else [])]
    pairs = [pair(inputs, targets, start_id=0)]
    (ours,) = score(loaded.model, loaded.params, loaded.mesh, pairs, execution=F32, rows=1, lengths=(8,))
    ids = [*inputs, 0, *targets]
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    theirs = [log_probs[i - 1, ids[i]].item() for i in range(len(inputs) + 1, len(ids))]
    np.testing.assert_allclose(ours.log_probs_T, theirs, rtol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_a_model_trained_here_is_loaded_as_the_same_architecture(tmp_path, name):
    config, model_class = OURS[name]
    model_type = {"T5": "t5", "GPT2": "gpt2", "Llama": "llama"}[model_class.partition("For")[0].partition("LM")[0]]
    text = {"tokenizer": None, "alignment": "native", "start_id": 0, "eos_ids": [1, 5], "bos_id": 2}
    write_random(tmp_path / "ours", config, model_type, text)
    convert(tmp_path / "ours", tmp_path / "hf", PROGRESS, to="hf")
    model, loading = getattr(transformers, model_class).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values()), loading
    # Tied in T5 whatever is said: then two parameters are one.
    assert sum(parameter.numel() for parameter in model.parameters()) == config.param_count()
    assert model.config.eos_token_id == [1, 5]
    if model_type == "t5":
        assert model.config.scale_decoder_outputs == config.recipe.scale_logits
        assert model.config.decoder_start_token_id == 0
    if model_type == "llama":
        assert model.config.rope_parameters["rope_theta"] == config.recipe.rope_theta
    model.save_pretrained(tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "back", PROGRESS)
    assert same_network(from_json(ModelConfig, read_manifest(tmp_path / "back")["model"]), config)
    for leaf in flatten(leaf_shapes(tmp_path / "ours"), "/"):
        ours, back = (read_leaf(tmp_path / folder, leaf).read().result() for folder in ("ours", "back"))
        assert np.array_equal(ours, back), leaf


def same_network(a, b):
    def plain(config):
        return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, z_loss=0.0, init="t5"))

    return plain(a) == plain(b)
