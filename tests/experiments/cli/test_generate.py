"""`twinstack generate` on small models of both families, from the command line."""

import io
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.config import to_json
from common.data.config import SentencePieceConfig
from common.data.tokenizers.sentence_piece import train_model
from common.errors import UserError
from common.files import read_json, write_json
from common.infer.config import Beam, Greedy, Sample
from common.terminal import harmless
from common.weights.folder import write_folder
from experiments.cli.generate import method_of, read_prompts
from experiments.cli.main import main
from tests.experiments.tiny_study import WORDS
from tests.helpers import FAMILIES, MAX_POSITIONS, split

PROMPTS = [" ".join(WORDS[:2]), WORDS[0], "", " ".join(WORDS[2:5])]
MODELS = {"gpt-learned": "native", "t5like-bias": "start_token"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    config = SentencePieceConfig(vocab_size=28, byte_fallback=False, character_coverage=1.0)
    tokenizer = train_model([" ".join(WORDS)] * 20, config)
    return {name: _folder(tmp_path_factory.mktemp("models") / name, name, tokenizer) for name in MODELS}


def _folder(path: Path, name: str, tokenizer: bytes) -> Path:
    text = {
        "tokenizer": {"kind": "sentencepiece", "file": "source/spiece.model", "sentinels": 0},
        "alignment": MODELS[name],
        "start_id": 0,
        "eos_ids": [1],
        "bos_id": None,
    }
    with write_folder(path) as writer:
        writer.manifest(model=to_json(FAMILIES[name]), text=text, source={})
        (writer.path / "source").mkdir()
        (writer.path / "source" / "spiece.model").write_bytes(tokenizer)
        params = jax.tree.map(np.asarray, split(FAMILIES[name])[1])
        writer.write_tree(params, stacked=("layers", "encoder", "decoder"))
    return path


both = pytest.mark.parametrize("name", MODELS)


def run(model: Path, *options: str) -> int:
    return main(["generate", str(model), "--max-new-tokens", "6", "--rows", "1", *options])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@both
def test_output_has_the_order_of_the_prompts(name: str, folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    file, out = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    file.write_text("".join(f"{p}\n" for p in PROMPTS))
    assert run(folders[name], "--file", str(file), "--out", str(out)) == 0
    made = rows(out)
    assert [row["prompt"] for row in made] == PROMPTS
    for row in made:
        assert row["finish"] in ("eos", "length")
        assert len(row["tokens"]) == 6 - (row["finish"] == "eos") or row["finish"] == "eos"
        assert row["log_probability"] < 0
    assert capsys.readouterr().out == ""
    # One alone, and as JSON lines, writes the same.
    for prompt, row in zip(PROMPTS, made, strict=True):
        assert run(folders[name], "--prompt", prompt) == 0
        assert capsys.readouterr().out == f"{row['text']}\n"
    again = tmp_path / "again.jsonl"
    assert run(folders[name], "--file", str(out), "--out", str(again)) == 0
    assert [row["tokens"] for row in rows(again)] == [row["tokens"] for row in made]


@both
def test_generated_text_is_scored_as_a_continuation(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """A prompt is the context of its text, for models that were trained with empty inputs and for native ones."""
    model, out, file = tmp_path / "model", tmp_path / "texts.jsonl", tmp_path / "pairs.jsonl"
    shutil.copytree(folders[name], model)
    manifest = read_json(model / "model.json")
    manifest["text"] |= {"prompts": "targets", "bos_id": 0}
    write_json(model / "model.json", manifest)
    prompts = [part for p in PROMPTS for part in ("--prompt", p)]
    assert run(model, *prompts, "--out", str(out)) == 0
    written = [row["tokens"] + [1] * (row["finish"] == "eos") for row in rows(out)]
    pairs = [{"context": p, "continuation": tokens} for p, tokens in zip(PROMPTS, written, strict=True)]
    for before, after in (("context", "continuation"), ("inputs", "targets")):
        file.write_text("".join(json.dumps({before: p["context"], after: p["continuation"]}) + "\n" for p in pairs))
        options = f"--file {file} --out {tmp_path}/scores.jsonl --rows 1 --lengths 32"
        assert main(["score", str(model), *options.split()]) == 0
        for made, scored in zip(rows(out), rows(tmp_path / "scores.jsonl"), strict=True):
            assert scored["log_likelihood"] == pytest.approx(made["log_probability"], abs=1e-4)
            assert scored["is_greedy"]


def test_output_to_a_pipe_makes_no_partial_file(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()), daemon=True)
    reader.start()
    assert run(folders["gpt-learned"], "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--out", str(pipe)) == 0
    reader.join(10)
    assert [json.loads(line)["prompt"] for line in heard[0].splitlines()] == PROMPTS[:2]
    assert os.listdir(tmp_path) == ["pipe"] and pipe.is_fifo()


def test_several_prompts_are_printed_as_json_lines(folders: dict[str, Path], capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    assert run(folders["t5like-bias"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == PROMPTS


def test_an_interrupted_command_resumes(
    folders: dict[str, Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    model, out, whole = folders["t5like-bias"], tmp_path / "texts.jsonl", tmp_path / "whole.jsonl"
    prompts = [part for p in PROMPTS for part in ("--prompt", p)]
    options = [*prompts, "--temperature", "1.5", "--samples", "6", "--seed", "3"]
    assert run(model, *options, "--out", str(whole)) == 0

    from common.infer import generate as module

    batches, decode = 0, module.Generator._generate_batch

    def third_fails(self: Any, *arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        return decode(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.Generator, "_generate_batch", third_fails)
        assert run(model, *options, "--out", str(out)) == 130
    partial = tmp_path / "texts.jsonl.partial"
    assert not out.exists()
    assert len(rows(partial)) == 16  # two batches, of eight devices a row each
    partial.write_text(partial.read_text() + '{"index": 23, "te')  # as a killed command may leave it
    batches = 10
    with monkeypatch.context() as patch:
        patch.setattr(module.Generator, "_generate_batch", third_fails)
        assert run(model, *options, "--out", str(out)) == 0
    assert batches == 10 + 1
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    # The output is complete: no model is opened.
    with monkeypatch.context() as patch:
        patch.setattr("experiments.cli.generate.open_found", None)
        assert run(model, *options, "--out", str(out)) == 0
    # With other options, the output is not reused.
    capsys.readouterr()
    assert run(model, *options[:-1], "4", "--out", str(out)) == 2
    assert "from another model, other prompts or other options" in capsys.readouterr().err


def test_the_texts_of_another_model_are_not_resumed(folders: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    """A path with other weights, another dtype or another tokenizer is another model; a moved model is the same one."""
    model, moved, out = tmp_path / "model", tmp_path / "moved", tmp_path / "texts.jsonl"
    shutil.copytree(folders["gpt-learned"], model)
    options = ["--prompt", PROMPTS[0], "--out", str(out)]
    assert run(model, *options) == 0
    shutil.copytree(model, moved)
    assert run(moved, *options) == 0 and "complete already" in capsys.readouterr().err
    assert run(model, *options, "--dtype", "bfloat16") == 2
    table = sorted((model / "parameters").glob("*table_VD*/**/c/**/*"))[-1]
    table.write_bytes(bytes([*table.read_bytes()[:-1], table.read_bytes()[-1] ^ 1]))
    assert run(model, *options) == 2
    manifest = read_json(moved / "model.json")
    write_json(moved / "model.json", manifest | {"text": manifest["text"] | {"eos_ids": [1, 5]}})
    assert run(moved, *options) == 2
    assert capsys.readouterr().err.count("from another model, other prompts or other options") == 3


def test_samples_and_beams(folders: dict[str, Path], tmp_path: Path) -> None:
    model = folders["gpt-learned"]
    for options in (["--temperature", "2"], ["--beams", "3", "--length-penalty", "1"]):
        out = tmp_path / f"{options[0]}.jsonl"
        prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
        assert run(model, *prompts, *options, "--samples", "2", "--out", str(out)) == 0
        made = rows(out)
        assert [row["prompt"] for row in made] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
        assert all(a["tokens"] != b["tokens"] for a, b in (made[:2], made[2:]))


def test_one_text_is_streamed(folders: dict[str, Path], monkeypatch: Any) -> None:
    class Terminal(io.StringIO):
        pieces: list[str]

        def write(self, text: str) -> int:
            self.pieces = [*getattr(self, "pieces", []), text]
            return super().write(text)

        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert run(folders["gpt-learned"], "--prompt", PROMPTS[0], "--max-new-tokens", "12") == 0
    assert len(terminal.pieces) > 2
    assert terminal.pieces[-1] == "\n"


def test_control_characters_are_escaped() -> None:
    assert harmless("a\x1b]0;owned\x07b\r\x9b2J") == r"a\u001b]0;owned\u0007b\r\u009b2J"
    assert harmless("tab\tnew\nline é 漢 🙂 [red]") == "tab\tnew\nline é 漢 🙂 [red]"
    assert harmless("\u202eabc\ud800") == r"\u202eabc\ud800"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Greedy()),
        ({"temperature": 0.0}, Greedy()),
        ({"temperature": 0.5}, Sample(temperature=0.5)),
        ({"top_k": 3}, Sample(top_k=3)),
        ({"temperature": 2.0, "top_k": 3, "top_p": 0.5}, Sample(temperature=2.0, top_k=3, top_p=0.5)),
        ({"beams": 2}, Beam(size=2)),
        ({"beams": 2, "length_penalty": 0.0}, Beam(size=2, length_penalty=0.0)),
    ],
)
def test_methods(options: dict[str, Any], expected: Any) -> None:
    names = ("temperature", "top_k", "top_p", "beams", "length_penalty")
    assert method_of(**{name: options.get(name) for name in names}) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beams", "2", "--temperature", "1"], "does not sample"),
        (["--beams", "2", "--temperature", "0"], "does not sample"),
        (["--length-penalty", "1"], "give --beams"),
        (["--temperature", "0", "--top-p", "0.5"], "greedy"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--samples", "2"], "one text"),
        (["--beams", "2", "--samples", "3"], "2 beams"),
        (["--rows", "0"], "1 or more"),
        (["--min-new-tokens", "7"], "max_new_tokens"),
        (["--stop", ""], "empty"),
        (["--dtype", "float16"], "bfloat16"),
        (["--max-new-tokens", str(MAX_POSITIONS)], "positions"),
        (["--seed", "-1"], "seed is -1: it must be 0 or more"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes(options: list[str], message: str, folders: dict[str, Path], capsys: Any) -> None:
    assert run(folders["gpt-learned"], "--prompt", PROMPTS[0], *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_prompts_write_an_empty_file(folders: dict[str, Path], tmp_path: Path) -> None:
    empty, out = tmp_path / "empty.txt", tmp_path / "out.jsonl"
    empty.write_text("")
    assert run(folders["gpt-learned"], "--file", str(empty), "--out", str(out)) == 0
    assert out.read_text() == ""


def test_prompt_files(tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("one\u2028still one\n\nthree\n")
    assert read_prompts(lines, io.StringIO()) == ["one\u2028still one", "", "three"]
    assert read_prompts(None, io.StringIO("\ufeffa\nb")) == ["a", "b"]
    lines.write_bytes(b"\xef\xbb\xbfone\r\ntwo")  # as some editors write it
    assert read_prompts(lines, io.StringIO()) == ["one", "two"]
    rows = tmp_path / "rows.jsonl"
    for end in ("", "\n", "\r\n"):
        rows.write_bytes(("\ufeff" + '{"prompt": "a"}\n{"prompt": "b\u2028"}' + end).encode())
        assert read_prompts(rows, io.StringIO()) == ["a", "b\u2028"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="bad.jsonl, line 2: no text named prompt"):
        read_prompts(bad, io.StringIO())
    mistakes = {
        "": "is blank",
        "[" * 10_000: "is not JSON",
        "9" * 5_000: "is not JSON",
        "7": "not int",
        "\xff": "UTF-8",
    }
    for line, message in mistakes.items():
        bad.write_bytes(b'{"prompt": "a"}\n' + line.encode("latin-1") + b"\n")
        with pytest.raises(UserError, match=f"bad.jsonl, line 2 .*{message}"):
            read_prompts(bad, io.StringIO())
    for absent in ("absent.txt", "absent.jsonl"):
        with pytest.raises(UserError, match="absent"):
            read_prompts(tmp_path / absent, io.StringIO())
