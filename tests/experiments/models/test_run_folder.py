"""A model folder made from a run reads and writes the same ids as the run."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from common.config import to_json
from common.data.config import BytePairConfig
from common.data.objectives.config import CausalLM, FullLM, PrefixLM, Supervised
from common.data.sources.config import SourceConfig
from common.data.tokenizers import byte_pair
from common.files import read_json
from common.infer.scored_texts import to_pair
from common.infer.texts import encode_prompt
from common.model import skeleton
from common.progress import ProgressBars
from common.recipe import LLAMA
from common.sharding.mesh import make_mesh
from common.train.loop import Fitted
from common.train.run_files import RunFiles
from common.trees import flatten
from common.weights.folder import write_folder
from experiments.cli.main import main
from experiments.families import builder
from experiments.models.finding import find_model, open_model
from experiments.models.run_folder import folder_from_run
from tests.experiments.models.opening import MESH
from tests.experiments.tiny_study import WORDS
from tests.tiny import EXECUTION

OBJECTIVES = {"causal_lm": CausalLM(), "full_lm": FullLM(), "prefix_lm": PrefixLM()}


def test_a_run_becomes_a_model_folder(run_dir: tuple[Path, Fitted], tmp_path: Path) -> None:
    """It has the same bits and tokenizer, and can be converted further."""
    path, fitted = run_dir
    assert main(["convert", str(path / "gpt"), str(tmp_path / "folder")]) == 0
    assert read_json(tmp_path / "folder" / "model.json")["source"] == {"format": "run", "row_length": 48}
    opened = open_model(str(tmp_path / "folder"), EXECUTION, make_mesh(MESH))
    for name, leaf in flatten(fitted.params).items():
        assert (np.asarray(flatten(opened.params)[name]) == np.asarray(leaf)).all(), name
    in_place = open_model(str(path / "gpt"), EXECUTION, make_mesh(MESH)).text
    text = " ".join(WORDS[:5])
    assert opened.text.tokenizer is not None and in_place.tokenizer is not None
    assert (opened.text.tokenizer.encode(text) == in_place.tokenizer.encode(text)).all()
    assert opened.text.conventions == in_place.conventions
    further = ["--to", "t5like", "--rung", "4"]
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "two"), *further]) == 0
    assert main(["convert", f"{path / 'gpt'}@4", str(tmp_path / "one"), *further]) == 0
    one, two = (find_model(str(tmp_path / name)) for name in ("one", "two"))
    assert one.config == two.config and one.parameters.shapes == two.parameters.shapes
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "one", "two"}


@pytest.mark.parametrize(
    ("kind", "prompts"), [("causal_lm", "targets"), ("full_lm", "targets"), ("prefix_lm", "inputs")]
)
def test_the_place_of_prompts_is_kept(run_dir: tuple[Path, Fitted], tmp_path: Path, kind: str, prompts: str) -> None:
    """A prompt follows the start token if inputs were empty in training."""
    arm = tmp_path / "run" / "gpt"
    shutil.copytree(run_dir[0] / "gpt", arm)
    config = read_json(arm / RunFiles.CONFIG)
    config["data"]["source"] |= {"inputs": None, "targets": None, "text": "en"}
    config["data"] |= {"objective": to_json(OBJECTIVES[kind]), "input_length": 24 * (kind == "prefix_lm")}
    (arm / RunFiles.CONFIG).write_text(json.dumps(config))
    assert find_model(str(arm)).open_text().conventions.prompts == prompts
    folder_from_run(str(arm), tmp_path / "folder", ProgressBars(Console(quiet=True)))
    assert find_model(str(tmp_path / "folder")).open_text().conventions.prompts == prompts


@pytest.mark.parametrize(
    "objective", [Supervised(eos_after_inputs=False), Supervised(), PrefixLM(complementary=True), CausalLM()]
)
def test_all_forms_of_a_model_read_the_same_ids(run_dir: tuple[Path, Fitted], tmp_path: Path, objective: Any) -> None:
    """The forms: the run, its model folder, and that folder converted to the other family."""
    arm = tmp_path / "gpt"
    shutil.copytree(run_dir[0] / "gpt", arm)
    config = read_json(arm / RunFiles.CONFIG)
    config["data"]["objective"] = to_json(objective)
    if not isinstance(objective, Supervised):
        config["data"]["source"] = to_json(SourceConfig(name="jsonl:x", inputs=None, targets=None, text="text"))
    (arm / RunFiles.CONFIG).write_text(json.dumps(config))
    assert main(["convert", str(arm), str(tmp_path / "folder")]) == 0
    assert main(["convert", str(tmp_path / "folder"), str(tmp_path / "other"), "--to", "t5like"]) == 0
    record, read = {"inputs": "one plus", "targets": "two"}, []
    for place in (arm, tmp_path / "folder", tmp_path / "other"):
        text = find_model(str(place)).open_text()
        pair, prompt = to_pair(record, text, 128, eos=True), encode_prompt("one plus", text)
        arrays = (pair.example.inputs_I, pair.example.targets_T, pair.example.weights_T, prompt.inputs_I)
        read.append([[x.tolist() for x in arrays], pair.start_id, prompt.start])
    assert read[0] == read[1] == read[2]


def test_an_export_remarks_on_the_ids_to_read(
    run_dir: tuple[Path, Fitted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Positions are those of the rows; the remarks describe what other programs cannot know."""
    arm = tmp_path / "gpt"
    shutil.copytree(run_dir[0] / "gpt", arm)
    config = read_json(arm / RunFiles.CONFIG)
    config["model"]["recipe"] = to_json(LLAMA)
    (arm / RunFiles.CONFIG).write_text(json.dumps(config))
    with write_folder(tmp_path / "llama") as writer:
        folder_text = {**to_json(find_model(str(arm)).open_text().conventions), "tokenizer": None}
        source = {"format": "run", "row_length": 48}
        writer.manifest(model=config["model"], text=folder_text, source=source)
        shapes = skeleton(builder(find_model(str(arm)).config, EXECUTION)).shapes
        writer.write_tree(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes), stacked=("layers",))
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "llama"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    said = capsys.readouterr().out
    assert "one sequence of ids: the inputs, 1 (end token), 0 (start token), the targets" in said
    written = read_json(tmp_path / "hf" / "config.json")
    assert (written["max_position_embeddings"], written["eos_token_id"]) == (48, 1)


def test_a_trained_byte_pair_tokenizer_is_kept(
    run_dir: tuple[Path, Fitted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = byte_pair.train_model([" ".join(WORDS)] * 20, BytePairConfig(vocab_size=280, sentinels=3))
    tokenizer = byte_pair.BytePairTokenizer.trained(model, sentinels=3)
    found = find_model(str(run_dir[0] / "gpt"))
    text = dataclasses.replace(found.open_text(), tokenizer=tokenizer)
    wide = dataclasses.replace(found.config, vocab_size=tokenizer.table_size)
    changed = dataclasses.replace(found, config=wide, open_text=lambda: text)
    monkeypatch.setattr("experiments.models.run_folder.find_model", lambda _: changed)
    folder_from_run("run", tmp_path / "folder", ProgressBars(Console(quiet=True)))
    again = find_model(str(tmp_path / "folder")).open_text().tokenizer
    assert isinstance(again, byte_pair.BytePairTokenizer)
    assert again.encode("one plus").tolist() == tokenizer.encode("one plus").tolist()
    assert (again.eos_id, again.sentinel_id(2)) == (tokenizer.eos_id, tokenizer.sentinel_id(2))
