"""Models found by path and opened with their text; runs that begin as one of them, from the command line."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from common.config import apply_overrides, to_json
from common.data.config import BytePairConfig, SentencePieceConfig
from common.data.objectives.config import CausalLM, FullLM, PrefixLM, Supervised
from common.data.sources.config import SourceConfig
from common.data.tokenizers import byte_pair
from common.data.tokenizers.saved import load_saved
from common.data.tokenizers.sentence_piece import train_model
from common.errors import UserError
from common.files import read_json
from common.infer.texts import encode_prompt
from common.model import skeleton
from common.progress import ProgressBars
from common.recipe import LLAMA
from common.sharding.mesh import make_mesh
from common.sharding.shape import MeshShape
from common.train.config import Budget
from common.train.loop import Fitted
from common.train.run_files import RunFiles
from common.trees import flatten
from common.weights.folder import write_folder
from experiments.cli.main import main
from experiments.cli.score import to_pair
from experiments.config import Experiment
from experiments.families import builder
from experiments.models.finding import find_model, open_model
from experiments.models.initial import check_initial
from experiments.models.run_folder import folder_from_run
from experiments.running.pipeline import open_data, train_arm
from tests.experiments.tiny_experiment import WORDS, tiny_experiment, write_data
from tests.tiny import EXECUTION, Observer, Stopped

MESH = MeshShape()
OBJECTIVES = {"causal_lm": CausalLM(), "full_lm": FullLM(), "prefix_lm": PrefixLM()}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    made = tiny_experiment(folder)
    train = dataclasses.replace(made.train, budget=Budget(unit="steps", amount=4), checkpoint_every=2)
    return dataclasses.replace(made, train=train)


@pytest.fixture(scope="module")
def run_dir(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fitted]:
    """A run of which only `gpt` has been trained."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    fitted = train_arm(experiment, "gpt", open_data(experiment), path, Observer())
    (path / "experiment.json").write_text("{}")
    return path, fitted


@pytest.fixture(scope="module")
def model_folder(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory, run_dir: Any) -> Path:
    """The same parameters as a model folder, in bfloat16, with a SentencePiece model."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    text = {
        "tokenizer": {"kind": "sentencepiece", "file": "source/spiece.model", "sentinels": 3, "add_bos": True},
        "alignment": "native",
        "start_id": 0,
        "eos_ids": [1, 7],
        "bos_id": 2,
    }
    with write_folder(path) as writer:
        writer.manifest(model=to_json(experiment.arms["gpt"].model), text=text, source={})
        (writer.path / "source").mkdir()
        lines = [" ".join(WORDS)] * 20
        config = SentencePieceConfig(vocab_size=28, byte_fallback=False, character_coverage=1.0)
        (writer.path / "source" / "spiece.model").write_bytes(train_model(lines, config))
        params = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), run_dir[1].params)
        writer.write_tree(params, stacked=("layers",))
    return path


def opened(path: Any, **how: Any) -> Any:
    return open_model(str(path), EXECUTION, make_mesh(MESH), **how)


def same_bits(one: Any, other: Any) -> None:
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# --- Opening


@pytest.mark.parametrize("form", ["{}/gpt", "{}/gpt@4", "{}/gpt/checkpoints/4"])
def test_a_run_is_opened(experiment: Experiment, run_dir: tuple[Path, Fitted], form: str) -> None:
    path, fitted = run_dir
    loaded = opened(form.format(path))
    same_bits(loaded.params, fitted.params)
    assert loaded.config == experiment.arms["gpt"].model
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


def test_a_model_folder_is_opened(experiment: Experiment, run_dir: tuple[Path, Fitted], model_folder: Path) -> None:
    loaded = opened(model_folder)
    same_bits(loaded.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), run_dir[1].params))
    text, ids = loaded.text, loaded.text.conventions
    assert (ids.alignment, ids.start_id, ids.eos_ids, ids.bos_id) == ("native", 0, (1, 7), 2)
    assert text.add_bos and text.tokenizer.sentinels == 3
    assert text.tokenizer.decode(text.tokenizer.encode("one plus two")) == "one plus two"
    halves = opened(model_folder, dtype=jnp.bfloat16).params
    assert {leaf.dtype for leaf in jax.tree.leaves(halves)} == {jnp.dtype(jnp.bfloat16)}


def test_a_run_becomes_a_model_folder(run_dir: tuple[Path, Fitted], tmp_path: Path) -> None:
    """Bit for bit, with its tokenizer; from there it goes on into other forms."""
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
def test_where_a_prompt_stands_goes_along(
    run_dir: tuple[Path, Fitted], tmp_path: Path, kind: str, prompts: str
) -> None:
    """Behind the start token where inputs were empty in training."""
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
def test_what_a_text_was_goes_along(
    experiment: Experiment, run_dir: tuple[Path, Fitted], tmp_path: Path, objective: Any
) -> None:
    """A run, its folder, and that folder as the other family read the same ids for the same text."""
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


def test_an_export_says_what_the_model_reads(
    run_dir: tuple[Path, Fitted], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command; positions are those of the rows, and the remarks state what another program would not know."""
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


def test_a_trained_byte_pair_tokenizer_goes_along(
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


def test_a_model_without_a_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mute"
    shutil.copytree(model_folder, path)
    manifest = read_json(path / "model.json")
    manifest["text"]["tokenizer"] = None
    (path / "model.json").write_text(json.dumps(manifest))
    assert find_model(str(path)).open_text().tokenizer is None


def test_a_run_is_used_without_its_training_data(
    experiment: Experiment, run_dir: tuple[Path, Fitted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is gone, and so is the cache: the tokenizer lies in the run directory."""
    then = open_data(experiment).tokenizer
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
    shutil.rmtree(moved / RunFiles.TOKENIZER)  # as runs were before they kept it
    with pytest.raises(UserError, match="moved"):
        find_model(str(moved)).open_text()


def test_a_run_has_its_tokenizer_before_its_first_step(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_yet(*_: Any) -> None:
        raise Stopped

    data = open_data(experiment)
    monkeypatch.setattr("common.train.loop.restore_or_begin", nothing_yet)
    folder = tmp_path / "gpt" / RunFiles.TOKENIZER
    with pytest.raises(Stopped):
        train_arm(experiment, "gpt", data, tmp_path, Observer())
    assert load_saved(folder).content_hash == data.tokenizer.content_hash
    (folder / "spiece.model").write_bytes(b"damaged")
    with pytest.raises(Stopped):  # launched again
        train_arm(experiment, "gpt", data, tmp_path, Observer())
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
def test_ids_beyond_the_table_are_refused(
    model_folder: Path, experiment: Experiment, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path, rows = tmp_path / "other", experiment.arms["gpt"].model.vocab_size
    shutil.copytree(model_folder, path)
    manifest = read_json(path / "model.json")
    (path / "model.json").write_text(json.dumps(manifest | {"text": manifest["text"] | change}))
    with pytest.raises(
        UserError, match=rf"other: {said}, but the model's table has {rows} rows \(ids 0 to {rows - 1}\)"
    ):
        find_model(str(path)).open_text()


def test_the_content_of_parameters(
    run_dir: tuple[Path, Fitted], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same wherever they lie; another at another step or in another folder."""
    arm = run_dir[0] / "gpt"
    shutil.copytree(arm, tmp_path / "arm")
    shutil.copytree(model_folder, tmp_path / "folder")
    contents = [find_model(str(path)).parameters.content() for path in (arm, f"{arm}@2", model_folder)]
    assert len(set(contents)) == 3
    again = [find_model(str(tmp_path / name)).parameters.content() for name in ("arm", "arm@2", "folder")]
    assert again == contents


@pytest.mark.parametrize(("kept", "said"), [(True, "tokenizer/ holds"), (False, "its data config now gives")])
def test_another_tokenizer_is_noticed(run_dir: tuple[Path, Fitted], tmp_path: Path, kept: bool, said: str) -> None:
    arm = tmp_path / "gpt"
    shutil.copytree(run_dir[0] / "gpt", arm)
    environment = read_json(arm / RunFiles.ENVIRONMENT)
    (arm / RunFiles.ENVIRONMENT).write_text(json.dumps({**environment, "tokenizer_hash": "other"}))
    if not kept:
        shutil.rmtree(arm / RunFiles.TOKENIZER)
    with pytest.raises(UserError, match=f"was trained with tokenizer other, but {said}"):
        opened(arm)


def test_a_folder_that_lacks_a_parameter(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "torn"
    shutil.copytree(model_folder, path)
    shutil.rmtree(path / "parameters" / "layers.mlp.in_DF")
    with pytest.raises(UserError, match="does not account for 1 of .* there is no layers.mlp.in_DF"):
        opened(path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{run}", r"is a whole comparison's directory: name one of its arms, .*/tiny/gpt$"),
        ("{run}/gtp", "does not exist: did you mean '.*/tiny/gpt'"),
        ("{run}/gpt@3", "no checkpoint of step 3; it has 2, 4"),
        ("{run}/gpt/checkpoints", "is neither of a model folder, .* it holds 2, 4"),
        ("{run}/experiment.json", "is a file; expected a model folder"),
        ("{model}@4", "is a model folder, which has no steps"),
        ("{here}/hf", "is a Hugging Face folder: `twinstack convert`"),
        ("{here}/pickled", "without safetensors, which is never read"),
        ("{here}/empty", "it holds nothing"),
    ],
)
def test_anything_else_is_named(
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
def test_a_manifest_that_says_something_else(
    model_folder: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    manifest = read_json(model_folder / "model.json")
    manifest["text"] |= change
    (tmp_path / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=said):
        find_model(str(tmp_path))


# --- Beginning as one


def beginning(experiment: Experiment, path: Any, *overrides: str) -> Experiment:
    return apply_overrides(experiment, [f"arms.gpt.init.path={json.dumps(str(path))}", *overrides])


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_an_arm_begins_as_a_model(
    experiment: Experiment, run_dir: tuple[Path, Fitted], model_folder: Path, kind: str, tmp_path: Path
) -> None:
    source = {"run": run_dir[0] / "gpt", "folder": model_folder}[kind]
    rule = 'arms.gpt.init.rules=[{"kind": "fresh", "leaves": "output.*"}]'
    short = beginning(experiment, source, rule, "train.budget.amount=1", "train.optimizer.weight_decay=0")
    short = apply_overrides(short, ["arms.gpt.learning_rate=1e-30"])
    watcher = Observer()
    fitted = train_arm(short, "gpt", open_data(short), tmp_path, watcher)
    expected = opened(source).params
    for name, leaf in flatten(fitted.params).items():
        assert np.array_equal(leaf, flatten(expected)[name]) == (name != "output.weight_DV"), name
    config = read_json(tmp_path / "gpt" / RunFiles.CONFIG)
    assert config["init"]["path"] == str(source) and config["init"]["rules"][0]["leaves"] == "output.*"
    assert "fresh: output.weight_DV" in watcher.notes[0]


def test_what_does_not_fit_is_known_before_anything_is_written(
    experiment: Experiment, run_dir: tuple[Path, Fitted], tmp_path: Path
) -> None:
    source = run_dir[0] / "gpt"
    wide = beginning(experiment, source, "arms.gpt.model.d_ff=48")
    with pytest.raises(UserError, match=r"in_DF: \[1, 16, 48\] here, \[1, 16, 32\] there"):
        check_initial(wide, tmp_path)
    assert check_initial(beginning(experiment, source), tmp_path) == []
    other = beginning(experiment, source, "arms.gpt.model.recipe.norm_epsilon=0.5")
    assert check_initial(other, None) == [f"gpt: not as in {source}@4: recipe.norm_epsilon: 1e-06 -> 0.5"]
    # An arm with checkpoints of its own never reads another's again.
    assert check_initial(beginning(experiment, tmp_path / "gone"), run_dir[0]) == []


@pytest.mark.parametrize(
    ("command", "paths"),
    [
        ("train tiny --arm gpt --init-from {run}", {"gpt": "{run}/gpt", "t5like": None}),
        ("train tiny --arm gpt --init-from {run}@2", {"gpt": "{run}/gpt@2", "t5like": None}),
        ("train tiny --arm t5like --init-from models/small", {"gpt": None, "t5like": "models/small"}),
        ("compare tiny --init-from {run}", {"gpt": "{run}/gpt", "t5like": "{run}"}),
        ("compare tiny arms.gpt.init.path=there", {"gpt": "there", "t5like": None}),
    ],
)
def test_the_command_line_says_what_arms_begin_as(
    experiment: Experiment,
    run_dir: tuple[Path, Fitted],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    paths: dict[str, str | None],
) -> None:
    made: list[Experiment] = []
    monkeypatch.setattr("experiments.registry.EXPERIMENTS", {"tiny": experiment.question})
    monkeypatch.setattr("experiments.registry.load", lambda name: experiment)
    monkeypatch.setattr("experiments.running.comparison.train", lambda experiment, *_, **__: made.append(experiment))
    monkeypatch.setattr("experiments.running.comparison.compare", lambda experiment, *_, **__: made.append(experiment))
    assert main(command.format(run=run_dir[0]).split()) == 0
    found = {name: arm.init.path if arm.init else None for name, arm in made[0].arms.items()}
    assert found == {name: path and path.format(run=run_dir[0]) for name, path in paths.items()}
