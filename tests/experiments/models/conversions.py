"""Conversions of small foreign models, for the tests of `experiments.models.convert`."""

import io
from pathlib import Path

from flax import nnx
from rich.console import Console

from common.config import from_json
from common.progress import ProgressBars
from common.recipe import Execution
from common.trees import flatten
from common.weights.folder import leaf_shapes, read_leaf, read_manifest
from experiments.families import ModelConfig, builder
from experiments.models.convert import convert
from tests.common.weights import foreign
from tests.common.weights.foreign import GPT2, LLAMA, T5, T5_V1_1

PROGRESS = ProgressBars(Console(file=io.StringIO()))


def run(source, destination, **options):
    return convert(Path(source), Path(destination), PROGRESS, **options)


def config_of(folder) -> ModelConfig:
    return from_json(ModelConfig, read_manifest(folder)["model"])


def leaves(folder):
    return {leaf: read_leaf(folder, leaf).read().result() for leaf in flatten(leaf_shapes(folder), "/")}


def module_shapes(config):
    build = builder(config, Execution())
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param))
    return {leaf: value.shape for leaf, value in flatten(params, "/").items()}


def round_trip(tmp_path, config, tensors, **write):
    """Converts to a model folder and back, checks that all bytes are equal, and returns the model folder."""
    source = foreign.write_hugging_face(tmp_path / "in", config, tensors, **write)
    run(source, tmp_path / "ours")
    run(tmp_path / "ours", tmp_path / "out", to="hf")
    files = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert foreign.read_hugging_face(tmp_path / "out") == foreign.read_hugging_face(source)
    for name in files:  # small ones, and as it happens the headers of safetensors too
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    return tmp_path / "ours"


MODELS = {
    "t5": (T5, foreign.t5),
    "t5-v1.1": (T5_V1_1, foreign.t5),
    "mt5": (T5_V1_1 | {"model_type": "mt5"}, foreign.t5),
    "gpt2": (GPT2, foreign.gpt2),
    "llama": (LLAMA, foreign.llama),
    "llama-tied": (LLAMA | {"tie_word_embeddings": True}, foreign.llama),
}
