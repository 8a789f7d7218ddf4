"""Mistaken command lines: each ends with a one-line error and status 2, and changes nothing."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import to_json
from common.errors import UserError
from experiments import find
from experiments.cli.main import main
from experiments.running import study_run

DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 5_000
DIGITS = "9" * 5_000
LONG = "x" * 300

NO_FILE = [
    "",
    " ",
    ".",
    "/",
    "{folder}",
    "{file}/x",
    LONG,
    f"new/{LONG}",
    "~nosuchuser/x",
    "{loop}",
    "a\udcff",
    "a\0",
]
"""Paths where no file can be written."""
NO_FOLDER = ["", " ", "/", "{file}", "{file}/x", LONG, f"new/{LONG}", "~nosuchuser/x", "{loop}", "a\udcff", "a\0"]
"""Paths where no folder exists or can be created."""
NO_MODEL = ["", ".", "/", "{folder}", "{file}", "{file}/x", LONG, "~nosuchuser/x", "{loop}", "a\udcff", "a\0"]
NO_MODEL += ["{folder}@3", "{file}@3", f"{{folder}}@{DIGITS}", "missing@", "@1", "-"]
BAD_NUMBERS = ["", "x", "1.5.2", "nan", "inf", "-inf", "1e400", "1_0", "٣", "0x10", DIGITS, f"-{DIGITS}", "1e999999999"]
HUGE = ["99999999999", str(2**40), str(2**64), "-1"]

TRAIN = ["run", "first_light", "arm=gpt"]
SCORE = ["score", "{folder}", "--file", "{rows}"]
GENERATE = ["generate", "{folder}", "--prompt", "x"]
LAUNCH = ["launch", "first_light", "--topology", "v5e-4", "--bucket", "gs://a-bucket", "train.mesh.fsdp=4"]


def destinations() -> Iterator[list[str]]:
    for path in NO_FILE:
        yield [*SCORE, "--out", path]
        yield [*GENERATE, "--out", path]
        yield ["report", "{run}", "--figure", path]
        yield ["results", "{run}", "--out", path]
    for path in NO_FOLDER:
        yield [*TRAIN, "--run-dir", path]
        yield [*LAUNCH, "--out", path]
        yield ["data", "prepare", "first_light", "--to", path]


def sources() -> Iterator[list[str]]:
    for path in NO_MODEL:
        yield ["score", path, "--file", "{rows}", "--out", "out.jsonl"]
        yield ["generate", path, "--prompt", "x"]
        if path in NO_MODEL[::4]:  # takes a third of a second each
            yield [*TRAIN, "--init-from", path]
        yield ["convert", path, "out"]
        yield from ([command, path] for command in ("report", "status"))
        yield ["results", path, "--out", "o.csv"]
    for path in [path for path in NO_FILE if path != "/"]:
        yield ["score", "{folder}", "--file", path, "--out", "out.jsonl"]
        yield ["generate", "{folder}", "--file", path]
        yield ["convert", "{folder}", "out", "--tokenizer", path]


def numbers() -> Iterator[list[str]]:
    bounded = {
        "--rows": [["data", "show", "first_light"], [*SCORE, "--out", "o"], GENERATE],
        "--workers": [["data", "prepare", "first_light"]],
        "--slices": [LAUNCH, ["plan", "first_light", "--topology", "v5e-4"]],
        "--price": [["plan", "first_light", "--topology", "v5e-4"]],
        "--jobs": [TRAIN],
        "--profile": [TRAIN],
        "--processes": [[*TRAIN, "--coordinator", "host:1", "--process", "0"]],
        "--process": [[*TRAIN, "--coordinator", "host:1", "--processes", "2"]],
        "--rung": [["convert", "{folder}", "out", "--to", "t5like"]],
        "--max-new-tokens": [GENERATE],
        "--min-new-tokens": [GENERATE],
        "--samples": [GENERATE],
        "--beams": [GENERATE],
        "--top-k": [GENERATE],
        "--seed": [GENERATE],
        "--temperature": [GENERATE],
        "--top-p": [GENERATE],
        "--length-penalty": [[*GENERATE, "--beams", "2"]],
        "--lengths": [[*SCORE, "--out", "o"]],
    }
    for option, asked in bounded.items():
        for command in asked:
            for number in [*BAD_NUMBERS, *HUGE]:
                if (option, number) not in {("--length-penalty", "-1")}:
                    yield [*command, f"{option}={number}"]
    for shape in ("fsdp=99999999999", f"fsdp={DIGITS}", "fsdp=-1", "fsdp=", "=4", "", "fsdp=٣", "fsdp=0"):
        yield ["plan", "first_light", "--topology", "v5e-4", "--mesh", shape]
    for topology in (
        "",
        "v5e",
        "v5e:0x0",
        f"v5e-{DIGITS}",
        f"v5e:{DIGITS}x4",
        f"{DIGITS}*v5e:4x4",
        "99999999999*v5e:4x4",
    ):
        yield ["plan", "first_light", "--topology", topology]
        yield ["launch", "first_light", "--bucket", "gs://a-bucket", "--topology", topology]


def overrides() -> Iterator[list[str]]:
    fields = ("data.rows", "train.seed", "arms.gpt.model", "data.source.name", "arms", "evaluation.splits")
    for field in fields:
        for value in (
            DEEP,
            DEEP_OBJECT,
            "[" * 200 + "]" * 200,
            DIGITS,
            f"[{DIGITS}]",
            '"\\u0000"',
            '"\\ud800"',
            "1e999",
        ):
            if (field, value) not in {("data.source.name", DEEP), ("data.source.name", "1e999")}:
                yield ["run", "first_light", f"{field}={value}"]
    for text in (
        "",
        "=",
        "=1",
        ".",
        "..=1",
        "a=",
        "data.rows=",
        "data.=1",
        "data..rows=1",
        f"{'a.' * 3000}b=1",
        "data.rows=NaN",
    ):
        yield ["run", "first_light", text]
    arm = to_json(find.load("first_light"))["arms"]["gpt"]
    for name in ("../evil", "..", "", "/abs", "a/b", "a\\b", "a\nb", "a\u202eb", "a\u001b[2Jb"):
        yield ["run", "first_light", f"arms={json.dumps({name: arm})}", "--print-config"]
    for name in ("", "../evil", "UPPER", "a b", "x" * 200):
        yield [*LAUNCH, "--run", name]
    for path in ("", "/", "{folder}", "{file}/x", LONG, "~nosuchuser/x"):
        yield ["data", "show", "first_light", f"data.tokenizer.path={path}"]


def files() -> Iterator[list[str]]:
    for bad in BAD_JSON:
        yield ["report", f"{{bad}}/{bad}"]
        yield from ([command, f"{{bad}}/{bad}/study"] for command in ("report", "status"))
        yield ["results", f"{{bad}}/{bad}/study", "--out", "o.csv"]
        yield ["run", "first_light", "--config", f"{{bad}}/{bad}/study/study.json"]
        yield ["score", "{folder}", "--file", f"{{bad}}/{bad}/rows.jsonl", "--out", "o"]
        yield ["generate", "{folder}", "--file", f"{{bad}}/{bad}/rows.jsonl"]
        yield ["generate", f"{{bad}}/{bad}/model", "--prompt", "x"]
        yield ["generate", f"{{bad}}/{bad}/arm", "--prompt", "x"]
        yield ["convert", f"{{bad}}/{bad}/arm", "out"]
        yield ["convert", f"{{bad}}/{bad}/model", "out", "--to", "hf"]
        yield ["convert", f"{{bad}}/{bad}/foreign", "out"]
        yield [
            "data",
            "show",
            "first_light",
            "data.tokenizer.kind=byte_pair",
            f"data.tokenizer.path={{bad}}/{bad}/tokenizer.json",
        ]


BAD_JSON = {
    "deep": DEEP,
    "deep object": DEEP_OBJECT,
    "closed": "[" * 200 + "]" * 200,
    "digits": DIGITS,
    "list": "[1]",
    "null": "null",
    "text": '"x"',
    "twice": '{"a": 1, "a": 2}',
    "nan": '{"a": NaN}',
    "infinite": '{"a": 1e999}',
    "half": '{"prompt": "\\ud800", "text": "\\ud800"}',
    "cut": '{"a": ',
    "empty": "",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Makes files, and returns the paths that replace names in braces in the command lines."""
    root = tmp_path_factory.mktemp("places")
    (root / "folder").mkdir()
    (root / "file").write_text("kept")
    (root / "loop").symlink_to("loop")
    (root / "rows.jsonl").write_text('{"text": "one"}\n')
    (root / "run").mkdir()
    (root / "run" / "study.json").write_text('{"arms": {}}')
    for name, text in BAD_JSON.items():
        folder = root / "bad" / name
        for inner, files in {
            ".": ["experiment.json", "rows.jsonl", "tokenizer.json"],
            "study": ["study.json", "runs.json"],
            "model": ["model.json"],
            "arm": ["config.json", "environment.json"],
            "foreign": ["config.json", "model.safetensors.index.json"],
        }.items():
            (folder / inner).mkdir(parents=True, exist_ok=True)
            for file in files:
                (folder / inner / file).write_text(text)
    names = {"folder": "folder", "file": "file", "loop": "loop", "rows": "rows.jsonl", "run": "run", "bad": "bad"}
    return {key: str(root / name) for key, name in names.items()}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Changes to an empty working directory, and gives `launch` a clean checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.launching.source.committed", lambda root=None: "0" * 40)
    return tmp_path


def filled(command: list[str], places: dict[str, str]) -> list[str]:
    for name, path in places.items():
        command = [part.replace(f"{{{name}}}", path) for part in command]
    return command


@pytest.mark.parametrize("kind", [destinations, sources, numbers, overrides, files])
def test_mistakes_are_one_line_and_status_2(here, places, capsys, kind):
    wrong = []
    for command in kind():
        try:
            status = main(filled(command, places))
        except Exception as error:  # so that the test reports all of them at once
            status = repr(error)
        captured = capsys.readouterr().err
        line = captured.removesuffix("\n")
        one_line = line.startswith("twinstack: error: ") and line.isprintable() and len(line) < 20_000
        if status != 2 or not one_line or os.listdir(here) or Path(places["file"]).read_text() != "kept":
            wrong.append(f"{[part[:80] for part in command]}: {status}, {captured[:300]}")
    assert not wrong, f"{len(wrong)} command lines:\n" + "\n".join(wrong)


@pytest.mark.parametrize("variable", ["TWINSTACK_CACHE", "XDG_CACHE_HOME"])
def test_an_impossible_cache_folder_is_one_line(places, monkeypatch, capsys, variable):
    monkeypatch.delenv("TWINSTACK_CACHE")
    for path in ("{file}", "{file}/x", "~nosuchuser/x", "{loop}", LONG):
        monkeypatch.setenv(variable, *filled([path], places))
        assert main(["data", "show", "first_light"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("twinstack: error: ") and error.count("\n") == 1


def test_a_question_is_never_markup(monkeypatch, capsys):
    class NoData:
        def __init__(self, *_, **__): ...

        def check(self): ...

        def work(self):
            raise UserError("enough")

    monkeypatch.setattr(study_run, "StudyWorker", NoData)
    question = "[/red] [link=x]who\x1b]0;owned\x07 \u202e?"
    assert main(["run", "first_light", f"question={question}", f"expected={question}", "name=[b]"]) == 2
    captured = capsys.readouterr()
    assert captured.out.count(r"[/red] [link=x]who\u001b]0;owned\u0007 \u202e?") == 2 and "[b]" in captured.out
    assert captured.err == "twinstack: error: enough\n"


def test_the_printed_config_is_the_same_json(capsys):
    assert main(["run", "first_light", "--print-config", "question=a\u202e\x9bé"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["question"] == "a\u202e\x9bé" and not {"\u202e", "\x9b"} & set(printed)
