"""Messages before an arm begins as another model: what does not fit and its cure, and whose tokens its rows are."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import apply_overrides, to_json
from common.data.config import BytePairConfig, SentencePieceConfig
from common.data.tokenizers import byte_pair
from common.data.tokenizers.pieces import differing_ids
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
from common.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from common.errors import UserError
from common.files import read_json, write_json, write_rows
from common.model import skeleton
from common.train.config import InitFrom
from common.train.run_files import RunFiles
from common.trees import flatten
from common.weights.folder import read_leaf, write_folder
from experiments.cli.main import main
from experiments.families import ModelConfig, builder
from experiments.models.initial import INITIAL_CONTENT, check_initial, check_tokenizer, initial_content
from experiments.run import Run
from experiments.study import Study
from tests.experiments.tiny_study import WORDS, tiny_study
from tests.tiny import EXECUTION, tiny

LINES = [" ".join(WORDS[start:] + WORDS[:start]) for start in range(len(WORDS))] * 20
PIECES = SentencePieceConfig(vocab_size=36, byte_fallback=False, character_coverage=1.0)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return tiny_study(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train_model(LINES, PIECES))


def write_model(path: Path, model: ModelConfig, tokenizer: SentencePieceTokenizer | None) -> Path:
    text: dict[str, Any] = {"alignment": "start_token", "start_id": 0, "eos_ids": [1], "bos_id": None}
    text["tokenizer"] = {"kind": "sentencepiece", "file": "source/spiece.model", "sentinels": 0} if tokenizer else None
    shapes = flatten(skeleton(builder(model, EXECUTION)).shapes)
    with write_folder(path) as writer:
        writer.manifest(model=to_json(model), text=text, source={})
        leaves = {name.replace(".", "/"): np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}
        for name, value in leaves.items():
            writer.create(name, value.shape, value.dtype, stacked=name.startswith("layers")).write(value).result()
        if tokenizer is not None:
            (writer.path / "source").mkdir()
            (writer.path / "source" / "spiece.model").write_bytes(tokenizer.serialized())
    return path


def beginning(study: Study, arm: str, path: Path, *overrides: str) -> Study:
    return apply_overrides(study, [f"arms.{arm}.init.path={json.dumps(str(path))}", *overrides])


def initial(study: Study, arm: str = "gpt") -> list[str]:
    return check_initial(arm, study.arms[arm], None)


def tokenizers(study: Study, tokenizer: Tokenizer, arm: str = "gpt") -> list[str]:
    return check_tokenizer(arm, study.arms[arm], tokenizer, None)


# --- The same weights


def begun(path: Path, recorded: str | None = None) -> Path:
    """Makes the directory of a run that has begun from weights of this hash, or from some of which none is known."""
    path.mkdir()
    write_json(path / RunFiles.ENVIRONMENT, {} if recorded is None else {INITIAL_CONTENT: recorded})
    write_rows(path / RunFiles.METRICS, [{"step": 1}])
    return path


def test_replaced_weights_of_a_model_folder_are_noticed(study: Study, tmp_path: Path) -> None:
    """One number that differs is enough; a folder of the same weights elsewhere is the same."""
    model = study.arms["gpt"].model
    init = InitFrom(path=str(write_model(tmp_path / "model", model, None)))
    found = initial_content(init, tmp_path / "new")
    assert found is not None and found == initial_content(init, begun(tmp_path / "run", found))
    moved = InitFrom(path=str(shutil.copytree(init.path, tmp_path / "elsewhere")))
    assert initial_content(moved, tmp_path / "run") == found
    leaves = flatten(skeleton(builder(model, EXECUTION)).shapes)
    name = min(leaves, key=lambda name: np.prod(leaves[name].shape)).replace(".", "/")
    handle = read_leaf(Path(init.path), name)
    handle[(0,) * handle.ndim].write(np.float32(1e-3)).result()
    with pytest.raises(UserError, match=f"run began from other weights than .*model holds now .hash {found}, now "):
        initial_content(init, tmp_path / "run")


def test_what_was_begun_before_hashes_were_recorded_goes_on(tmp_path: Path, study: Study) -> None:
    """And so does a run whose model is gone: it resumes from its own checkpoints."""
    init = InitFrom(path=str(write_model(tmp_path / "model", study.arms["gpt"].model, None)))
    assert initial_content(init, begun(tmp_path / "earlier")) is None and initial_content(None, tmp_path) is None
    gone = InitFrom(path=str(tmp_path / "gone"))
    assert initial_content(gone, begun(tmp_path / "run", "00")) is None
    with pytest.raises(UserError, match="gone does not exist"):
        initial_content(gone, tmp_path / "new")


# --- Sizes


def test_the_error_suggests_overrides_with_the_other_models_config(study: Study, tmp_path: Path) -> None:
    """The message is one short line, and its overrides suffice."""
    source = write_model(tmp_path / "model", study.arms["gpt"].model, None)
    other = ("d_model=24", "d_ff=48", "num_layers=2", "recipe.mlp=gelu", "recipe.dropout=0.1")
    wrong = beginning(study, "gpt", source, *(f"arms.gpt.model.{change}" for change in other))
    with pytest.raises(UserError) as caught:
        initial(wrong)
    said = str(caught.value)
    assert len(said) < 700 and "and 7 more" in said and "init.rules" not in said
    cure = said.partition("To take that model's config: ")[2].split()
    assert cure == [f"arms.gpt.model.{x}" for x in ("num_layers=1", "d_model=16", "d_ff=32", "recipe.mlp=relu")]
    assert initial(apply_overrides(wrong, cure)) == [
        f"gpt: not as in {source}: recipe.dropout: 0.0 -> 0.1"  # which no weight depends on
    ]


def test_the_error_suggests_rules_where_little_differs(study: Study, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", study.arms["gpt"].model, None)
    with pytest.raises(UserError) as caught:
        initial(beginning(study, "gpt", source, "arms.gpt.model.vocab_size=256"))
    rules = str(caught.value).partition("for example ")[2].partition(". To take that model's config: ")
    assert rules[0].startswith("arms.gpt.init.rules=[") and rules[2] == "arms.gpt.model.vocab_size=128"
    wide = beginning(study, "gpt", source, "arms.gpt.model.vocab_size=256", rules[0])
    assert initial(wide) == [f"gpt: not as in {source}: vocab_size: 128 -> 256"]


def test_the_error_suggests_converting_the_other_family(study: Study, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", study.arms["gpt"].model, None)
    wrong = beginning(study, "t5like", source)
    with pytest.raises(UserError, match=f"It is a gpt: run `twinstack convert {source} NEW --to t5like` first"):
        initial(wrong, "t5like")
    assert initial(wrong, "gpt") == [], "another arm's beginning is not this one's affair"


def test_only_the_trained_arm_is_checked(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The token table of another arm may be too small."""

    def opened(name: str, _: Run) -> None:
        raise UserError(f"data for {name}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.find.OWN", ("tiny",))
    monkeypatch.setattr("experiments.find.load", lambda name: study)
    monkeypatch.setattr("experiments.running.execute.open_data", opened)
    small = "arms.gpt.model.vocab_size=20"
    for command, said in (
        (["run", "tiny", "arm=t5like"], "data for t5like"),
        (["run", "tiny", "arm=gpt"], "arms.gpt.model.vocab_size is 20, less than the tokenizer's 36"),
        (["run", "tiny"], "arms.gpt.model.vocab_size is 20, less than the tokenizer's 36"),
        (["plan", "tiny"], "arms.gpt.model.vocab_size is 20, less than the tokenizer's 36"),
    ):
        assert main([*command, small]) == 2
        assert said in capsys.readouterr().err


# --- Tokenizers


def test_another_tokenizer_is_an_error_unless_permitted(
    study: Study, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """The other tokenizer has the same number of ids, but other tokens."""
    theirs = SentencePieceTokenizer(train_model([line.upper() for line in LINES], PIECES))
    source = write_model(tmp_path / "model", tiny("gpt"), theirs)
    begun = beginning(study, "gpt", source)
    with pytest.raises(
        UserError, match=r"gpt would start from .*/model, which has another tokenizer: \d+ of 36 ids"
    ) as e:
        tokenizers(begun, tokenizer)
    said = str(e.value)
    cures = said.partition("To use that tokenizer: ")[2].partition("; ")
    config = apply_overrides(begun, [f"arms.gpt.{cure}" for cure in cures[0].split()]).arms["gpt"].data.tokenizer
    assert tokenizers(begun, load_tokenizer(config)) == []
    (line,) = tokenizers(apply_overrides(begun, [cures[2].split()[0]]), tokenizer)
    assert line.startswith("warning: gpt starts with token tables of another tokenizer")
    fresh = [{"kind": "fresh", "leaves": leaves} for leaves in ("embedding.*", "output.*")]
    assert tokenizers(apply_overrides(begun, [f"arms.gpt.init.rules={json.dumps(fresh)}"]), tokenizer) == []
    assert tokenizers(begun, tokenizer, "t5like") == []


def test_the_same_tokenizer_is_recognised(study: Study, tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", tiny("gpt"), tokenizer)
    assert tokenizers(beginning(study, "gpt", source), tokenizer) == []
    manifest = read_json(source / "model.json")
    manifest["text"]["tokenizer"] = None
    (source / "model.json").write_text(json.dumps(manifest))
    (line,) = tokenizers(beginning(study, "gpt", source), tokenizer)
    assert line == f"gpt: {source} has no tokenizer, so it may have been trained with another"


def test_tokens_are_compared_and_not_files(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    more: Tokenizer = SentencePieceTokenizer(tokenizer.serialized(), sentinels=5)
    assert differing_ids(tokenizer, more) == ([], 36)
    model = byte_pair.train_model(LINES, BytePairConfig(vocab_size=280))
    one = byte_pair.BytePairTokenizer.trained(model, sentinels=3)
    for name, content in one.files().items():
        (tmp_path / name).write_bytes(content.replace(b"\n", b""))
    other = byte_pair.load_byte_pair(tmp_path, sentinels=2, eos=None)
    assert one.content_hash != other.content_hash
    assert differing_ids(one, other) == ([280, 281], 282), "sentinels count down from the top"
