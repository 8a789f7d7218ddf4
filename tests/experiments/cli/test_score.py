"""`twinstack score` on small models, with text and with ids."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.config import to_json
from common.infer.scored_texts import to_pair
from common.weights.folder import write_folder
from experiments.cli.main import main
from tests.common.infer.test_score import alone
from tests.common.infer.test_scored_texts import BOS, EOS, START, settings
from tests.helpers import FAMILIES, MAX_POSITIONS, VOCAB, split


def model_folder(path: Path, name: str, alignment: str, tokenizer: Any = None) -> Path:
    text = {"tokenizer": tokenizer, "alignment": alignment, "start_id": START, "eos_ids": [EOS], "bos_id": BOS}
    with write_folder(path) as writer:
        writer.manifest(model=to_json(FAMILIES[name]), text=text, source={})
        params = jax.tree.map(np.asarray, split(FAMILIES[name])[1])
        writer.write_tree(params, stacked=("layers", "encoder", "decoder"))
    return path


def scored(model: Path, records: list[Any], tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    file, out = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["score", str(model), "--file", str(file), "--out", str(out), "--lengths", "16", *options]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize(("name", "alignment"), [("gpt-learned", "native"), ("t5like-bias", "start_token")])
def test_scores_have_the_order_of_the_file(name: str, alignment: str, tmp_path: Path, capsys: Any) -> None:
    records = [
        {"inputs": [7, 0, 8], "targets": [9, 0], "note": "kept"},
        {"context": [4], "continuation": [6, 6, 6]},
        {"text": [5, 4]},
        {"inputs": [], "targets": []},
    ]
    path = model_folder(tmp_path / "model", name, alignment)
    rows = scored(path, records, tmp_path, "--eos", "--rows", "1")
    text = settings(None, alignment=alignment, eos_ids=(EOS,))
    for record, row in zip(records, rows, strict=True):
        p = to_pair(record, text, VOCAB, eos=True)
        chosen = p.example.weights_T > 0
        log_probs_TV, targets_T = alone(FAMILIES[name], p)
        expected_T = log_probs_TV[np.arange(len(targets_T)), targets_T][chosen]
        np.testing.assert_allclose(row.pop("log_probs"), expected_T, atol=2e-5)
        assert row.pop("log_likelihood") == pytest.approx(expected_T.sum(), rel=1e-4)
        assert row.pop("tokens") == chosen.sum()
        assert row.pop("is_greedy") == (log_probs_TV.argmax(-1) == targets_T)[chosen].all()
        assert row == record
    assert f"4 texts, {3 + 4 + 3 + 1} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"inputs": [1], "targets": [2]}', "{"], "line 2 is not JSON"),
        (['{"inputs": [1]}'], "line 1 must be an object with inputs and targets or context and continuation or text"),
        (['{"text": [1], "inputs": [1], "targets": [1]}'], "line 1 must be an object"),
        (["[1]"], "line 1 must be a JSON object, not list"),
        (['{"text": [1]}', "", '{"text": [1]}'], "line 2 is blank"),
        (['{"text": 3}'], "line 1: text must be a text, or a list of token ids"),
        (['{"text": [1.5]}'], "line 1: text must be a text, or a list"),
        (['{"text": [true]}'], "line 1: text must be a text, or a list"),
        ([f'{{"text": [1, {VOCAB}]}}'], f"line 1: text contains token {VOCAB}; ids go from 0 to {VOCAB - 1}"),
        (['{"text": [-1]}'], "line 1: text contains token -1"),
        (['{"text": "one"}'], "line 1: text is text, but the model has no tokenizer"),
        (['{"text": [1]}', json.dumps({"text": [1] * 40})], "line 2: it has 0 input and 40 target tokens"),
    ],
)
def test_mistakes_name_the_line(lines: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    path = model_folder(tmp_path / "model", "gpt-learned", "native")
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    command = f"score {path} --file {tmp_path}/pairs.jsonl --out {tmp_path}/out.jsonl --lengths 16,32"
    assert main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_text_longer_than_the_models_positions_is_an_error(tmp_path: Path, capsys: Any) -> None:
    path = model_folder(tmp_path / "model", "gpt-learned", "native")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"text": [1] * (MAX_POSITIONS + 1)}))
    assert main(f"score {path} --file {tmp_path}/pairs.jsonl --out {tmp_path}/out.jsonl".split()) == 2
    assert f"the model has {MAX_POSITIONS} positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dtype float23", "--dtype float23: did you mean 'float32'"),
        ("--rows 0", "--rows is 0"),
        ("--lengths 3,", "--lengths '3,' must be whole numbers"),
        ("--lengths 0", "--lengths '0' must be"),
    ],
)
def test_options_are_checked(options: str, message: str, tmp_path: Path, capsys: Any) -> None:
    assert main(f"score nothing --file a --out b {options}".split()) == 2
    assert message in capsys.readouterr().err


def test_a_batch_has_no_more_rows_than_examples(tmp_path: Path) -> None:
    path = model_folder(tmp_path / "model", "gpt-learned", "native")
    one, many = (scored(path, [{"text": [5, 4]}], tmp_path, "--rows", rows) for rows in ("1", str(2**20)))
    assert one == many


def test_the_input_file_is_not_overwritten(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"text": [1]}\n')
    (tmp_path / "same").symlink_to(file)
    for out in (file, tmp_path / "same"):
        assert main(f"score nothing --file {file} --out {out}".split()) == 2
        assert "is --file itself" in capsys.readouterr().err
    assert file.read_text() == '{"text": [1]}\n'


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    assert main(f"score nothing --file {tmp_path}/a --out b".split()) == 2
