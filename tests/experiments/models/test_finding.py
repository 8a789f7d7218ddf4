"""Models are found by path and opened with their text codec; anything else is an error that names it."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.data.tokenizers.saved import load_saved
from common.errors import UserError
from common.files import read_json
from common.train.loop import Fitted
from common.train.run_files import RunFiles
from common.trees import flatten
from experiments.cli.main import main
from experiments.models.finding import find_model
from experiments.running.pipeline import open_data
from experiments.study import Study
from tests.experiments.models.opening import opened, same_bits
from tests.experiments.tiny_study import train_run
from tests.tiny import Observer, Stopped


@pytest.mark.parametrize("form", ["{}/gpt", "{}/gpt@4", "{}/gpt/checkpoints/4"])
def test_a_run_is_opened(study: Study, run_dir: tuple[Path, Fitted], form: str) -> None:
    path, fitted = run_dir
    loaded = opened(form.format(path))
    same_bits(loaded.params, fitted.params)
    assert loaded.config == study.arms["gpt"].model
    assert loaded.origin == f"{path}/gpt@4"
    text, ids = loaded.text, loaded.text.conventions
    assert (ids.alignment, ids.start_id, ids.eos_ids, ids.bos_id) == ("start_token", 0, (1,), None)
    assert not text.add_bos
    assert text.tokenizer.decode(text.tokenizer.encode("one plus two")) == "one plus two"
    assert set(flatten(loaded.model.shapes)) == set(flatten(loaded.params))


def test_an_older_step(run_dir: tuple[Path, Fitted]) -> None:
    path, fitted = run_dir
    older = opened(f"{path}/gpt@2")
    assert older.origin == f"{path}/gpt@2"
    assert not np.array_equal(older.params["embedding"]["table_VD"], fitted.params["embedding"]["table_VD"])


def test_a_model_folder_is_opened(study: Study, run_dir: tuple[Path, Fitted], model_folder: Path) -> None:
    loaded = opened(model_folder)
    same_bits(loaded.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), run_dir[1].params))
    text, ids = loaded.text, loaded.text.conventions
    assert (ids.alignment, ids.start_id, ids.eos_ids, ids.bos_id) == ("native", 0, (1, 7), 2)
    assert text.add_bos and text.tokenizer.sentinels == 3
    assert text.tokenizer.decode(text.tokenizer.encode("one plus two")) == "one plus two"
    halves = opened(model_folder, dtype=jnp.bfloat16).params
    assert {leaf.dtype for leaf in jax.tree.leaves(halves)} == {jnp.dtype(jnp.bfloat16)}


def test_a_model_without_a_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mute"
    shutil.copytree(model_folder, path)
    manifest = read_json(path / "model.json")
    manifest["text"]["tokenizer"] = None
    (path / "model.json").write_text(json.dumps(manifest))
    assert find_model(str(path)).open_text().tokenizer is None


def test_a_run_is_used_without_its_training_data(
    study: Study, run_dir: tuple[Path, Fitted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without source file and cache, the tokenizer comes from the run directory."""
    then = open_data("gpt", study.arms["gpt"]).tokenizer
    monkeypatch.setenv("TWINSTACK_CACHE", str(tmp_path / "cache"))
    config = read_json(run_dir[0] / "gpt" / RunFiles.CONFIG)
    config["data"]["source"]["name"] = f"jsonl:{tmp_path}/moved/{{split}}.jsonl"
    moved = tmp_path / "moved" / "gpt"
    shutil.copytree(run_dir[0] / "gpt", moved)
    (moved / RunFiles.CONFIG).write_text(json.dumps(config))
    tokenizer = find_model(str(moved)).open_text().tokenizer
    assert tokenizer is not None and tokenizer.content_hash == then.content_hash
    assert main(["convert", str(moved), str(tmp_path / "folder")]) == 0
    assert find_model(str(tmp_path / "folder")).open_text().tokenizer.content_hash == then.content_hash  # type: ignore
    shutil.rmtree(moved / RunFiles.TOKENIZER)  # as in runs from before tokenizers were saved
    with pytest.raises(UserError, match="moved"):
        find_model(str(moved)).open_text()


def test_a_run_has_its_tokenizer_before_its_first_step(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_yet(*_: Any) -> None:
        raise Stopped

    data = open_data("gpt", study.arms["gpt"])
    monkeypatch.setattr("common.train.loop.restore_or_begin", nothing_yet)
    folder = tmp_path / "gpt" / RunFiles.TOKENIZER
    with pytest.raises(Stopped):
        train_run(study.arms["gpt"], "gpt", tmp_path / "gpt", Observer())
    assert load_saved(folder).content_hash == data.tokenizer.content_hash
    (folder / "spiece.model").write_bytes(b"damaged")
    with pytest.raises(Stopped):  # launched again
        train_run(study.arms["gpt"], "gpt", tmp_path / "gpt", Observer())
    assert load_saved(folder).content_hash == data.tokenizer.content_hash


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"tokenizer": {"kind": "sentencepiece", "file": "source/spiece.model", "sentinels": 200}},
            "the tokenizer has id 227",
        ),
        ({"eos_ids": [1, 128]}, "eos_ids has id 128"),
        ({"start_id": -1}, "start_id has id -1"),
        ({"bos_id": 10**6}, "bos_id has id 1000000"),
    ],
)
def test_ids_beyond_the_table_are_errors(
    model_folder: Path, study: Study, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path, rows = tmp_path / "other", study.arms["gpt"].model.vocab_size
    shutil.copytree(model_folder, path)
    manifest = read_json(path / "model.json")
    (path / "model.json").write_text(json.dumps(manifest | {"text": manifest["text"] | change}))
    with pytest.raises(
        UserError, match=rf"other: {said}, but the model's table has {rows} rows \(ids 0 to {rows - 1}\)"
    ):
        find_model(str(path)).open_text()


def test_the_content_hash_of_parameters(
    run_dir: tuple[Path, Fitted], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is independent of the path, and differs between steps and models."""
    arm = run_dir[0] / "gpt"
    shutil.copytree(arm, tmp_path / "arm")
    shutil.copytree(model_folder, tmp_path / "folder")
    contents = [find_model(str(path)).parameters.content() for path in (arm, f"{arm}@2", model_folder)]
    assert len(set(contents)) == 3
    again = [find_model(str(tmp_path / name)).parameters.content() for name in ("arm", "arm@2", "folder")]
    assert again == contents


@pytest.mark.parametrize(("kept", "said"), [(True, "tokenizer/ holds"), (False, "its data config now gives")])
def test_a_tokenizer_other_than_in_training_is_an_error(
    run_dir: tuple[Path, Fitted], tmp_path: Path, kept: bool, said: str
) -> None:
    arm = tmp_path / "gpt"
    shutil.copytree(run_dir[0] / "gpt", arm)
    environment = read_json(arm / RunFiles.ENVIRONMENT)
    (arm / RunFiles.ENVIRONMENT).write_text(json.dumps({**environment, "tokenizer_hash": "other"}))
    if not kept:
        shutil.rmtree(arm / RunFiles.TOKENIZER)
    with pytest.raises(UserError, match=f"was trained with tokenizer other, but {said}"):
        opened(arm)


def test_a_folder_without_one_parameter_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn"
    shutil.copytree(model_folder, path)
    shutil.rmtree(path / "parameters" / "layers.mlp.in_DF")
    with pytest.raises(UserError, match="does not account for 1 of .* there is no layers.mlp.in_DF"):
        opened(path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{run}", r"is a whole study's directory: name one of its runs, .*/tiny/gpt$"),
        ("{run}/gtp", "does not exist: did you mean '.*/tiny/gpt'"),
        ("{run}/gpt@3", "no checkpoint of step 3; it has 2, 4"),
        ("{run}/gpt/checkpoints", "is not a model folder, .* it holds 2, 4"),
        ("{run}/study.json", "is a file; expected a model folder"),
        ("{model}@4", "is a model folder, which has no steps"),
        ("{here}/hf", "is a Hugging Face folder: `twinstack convert`"),
        ("{here}/pickled", "without safetensors; pickles are never read"),
        ("{here}/empty", "it holds nothing"),
    ],
)
def test_anything_else_is_described(
    run_dir: tuple[Path, Fitted], model_folder: Path, tmp_path: Path, path: str, said: str
) -> None:
    for name, file in (("hf", "model.safetensors"), ("pickled", "pytorch_model.bin"), ("empty", None)):
        (tmp_path / name).mkdir()
        if file:
            (tmp_path / name / file).touch()
    with pytest.raises(UserError, match=said):
        find_model(path.format(run=run_dir[0], model=model_folder, here=tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokenizer": {"kind": "sentencepeice", "file": "x"}}, "neither a sentencepiece with file and sentinels nor"),
        ({"tokenizer": {"kind": "byte_pair"}}, "neither a sentencepiece"),
        ({"tokenizer": {"kind": "byte_pair", "file": "../tokenizer.json", "sentinels": 0}}, "outside its folder"),
        ({"tokenizer": {"kind": "sentencepiece", "file": "/spiece.model", "sentinels": 0}}, "outside its folder"),
        ({"tokenizer": {"kind": "byte_pair", "vocab": "/etc/vocab.json", "merges": "x"}}, "outside its folder"),
        ({"alignment": "nativ"}, "text.alignment: unknown value 'nativ': did you mean 'native'"),
        ({"eos": 1}, "unknown field 'eos' in text"),
    ],
)
def test_malformed_manifests_are_errors(model_folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    manifest = read_json(model_folder / "model.json")
    manifest["text"] |= change
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=said):
        find_model(str(tmp_path))
