"""`twinstack data prepare`: tokenizes everything before a run, and prints a table of it."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from rich.console import Console

from common.data.objectives.config import CausalLM
from common.data.sources.config import SourceConfig
from common.data.tokenized import prepare as module
from common.data.tokenized.prepared import VARIABLE
from common.data.tokenizers.saved import saved_files
from common.errors import UserError
from experiments import find
from experiments.cli.main import main
from experiments.cli.prepare_data import prepare_data
from experiments.running import pipeline, scored_splits
from experiments.running.pipeline import Data, open_data
from experiments.running.scored_splits import open_tests
from experiments.study import Study
from tests.experiments.tiny_study import tiny_study, with_data, with_evaluation, write_data

COLUMNS = ["split", "records", "kept", "empty", "tokens", "skipped", "MB", "seconds", "folder"]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    write_data(tmp_path)
    (tmp_path / "test.jsonl").write_text((tmp_path / "validation.jsonl").read_text())
    monkeypatch.setenv("TWINSTACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    made = tiny_study(tmp_path)
    return made.edited(lambda run: with_evaluation(run, splits=("test", "validation")))


def opened(study: Study) -> Data:
    """Opens the data anew, as another process would."""
    pipeline._open.cache_clear()
    scored_splits._open_tests.cache_clear()
    return open_data("gpt", study.arms["gpt"])


def shown(study: Study, **options: object) -> str:
    out = io.StringIO()
    prepare_data(study, Console(file=out, width=40), **options)  # type: ignore[arg-type]
    return out.getvalue()


def rows(text: str) -> list[list[str]]:
    """Returns the cells of each row of the table."""
    lines = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    assert COLUMNS in lines
    return [cells for cells in lines[lines.index(COLUMNS) + 2 :] if len(cells) == len(COLUMNS)]


def test_all_splits_are_tokenized_and_listed(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = shown(study, workers=1)
    found = {row[0]: row for row in rows(first)}
    assert list(found) == ["train", "validation", "test"]
    assert [found["train"][i] for i in (1, 2, 3, 5)] == ["300", "300", "0", "0"]
    assert found["test"][1] == "40" and re.fullmatch(r"inputs \d+", found["test"][4])
    for row in found.values():
        folder = Path(row[8])
        manifest = json.loads((folder / "manifest.json").read_text())
        size = sum(path.stat().st_size for path in folder.glob("*.npy"))
        assert manifest["bytes"] == size and row[6] == f"{size / 1e6:.2f}"
    monkeypatch.setattr(module, "write_shard", None)
    second = {row[0]: row for row in rows(shown(study))}
    assert [row[:7] + row[8:] for row in second.values()] == [row[:7] + row[8:] for row in found.values()]
    assert all(row[7] == "0.0" for row in second.values())
    data = opened(study)
    assert list(open_tests(study.arms["gpt"], data.tokenizer)) == ["test", "validation"], "a run makes nothing anymore"
    assert data.train.batch(0).examples > 0 and data.validation.batch(0).examples > 0


def test_arms_with_other_data_get_a_table_of_their_own(study: Study) -> None:
    """Seeds and rows change no token; another objective does. Splits of all arms that share data are prepared."""
    gpt = study.arms["gpt"]
    text = dataclasses.replace(gpt.data.source, inputs=None, targets=None, text="en")
    arms = {
        "seeded": with_evaluation(with_data(gpt, seed=1, rows=8), splits=("test",)),
        "causal": with_data(with_evaluation(gpt, splits=()), objective=CausalLM(), source=text),
        "gpt": gpt,
    }
    first, second = shown(dataclasses.replace(study, arms=arms), workers=1).split("data of ")[1:]
    assert first.startswith("seeded, gpt:") and second.startswith("causal:")
    assert [row[0] for row in rows(first)] == ["train", "validation", "test"]
    assert [row[0] for row in rows(second)] == ["train", "validation"]


def test_skipped_records_are_listed_once(study: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"en": "one"\n' * 4 + '{"en": "one", "reversed": ""}\n')
    text = shown(study, workers=1)
    train = rows(text)[0]
    assert [train[i] for i in (1, 2, 3, 5)] == ["305", "301", "0", "4"]
    (line,) = [line for line in text.splitlines() if "skipped:" in line]
    assert line.startswith("train: 4 of 305 records are skipped: ")
    assert [f"line {n}" in line for n in (301, 302, 303, 304)] == [True, True, True, False]
    skipped = Path(line.rpartition("all: ")[2]).read_text().splitlines()
    assert len(skipped) == 4 and "line 304" in skipped[3]
    assert not caplog.messages, "the table lists them already"


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_tokens_may_be_written_to_a_folder_or_url(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expected = opened(study).train.batch(3).fingerprint
    to = "memory://bucket/prepared" if kind == "url" else str(tmp_path / "prepared")
    text = shown(study, workers=1, to=to)
    assert all(row[8].startswith(f"{to}/") for row in rows(text)) and f"{VARIABLE}={to}" in text
    monkeypatch.setenv("TWINSTACK_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv(VARIABLE, to)
    monkeypatch.setattr(module, "write_shard", None)
    data = opened(study)
    open_tests(study.arms["gpt"], data.tokenizer)
    assert data.train.batch(3).fingerprint == expected
    assert not (tmp_path / "other" / "tokenized").exists()
    assert rows(shown(study))[0][8].startswith(f"{to}/"), "found there, not made"
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("kind", ["folder", "url"])
@pytest.mark.parametrize("loaded", [False, True], ids=["trained", "loaded"])
def test_a_run_needs_only_the_prepared_data(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, loaded: bool
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for file in tmp_path.glob("*.jsonl"):
        file.rename(raw / file.name)
    source = SourceConfig(name=f"jsonl:{raw}/{{split}}.jsonl", inputs="en", targets="reversed")
    study = study.edited(lambda run: with_data(run, source=source))
    if loaded:
        trained = opened(study).tokenizer
        (raw / "spiece.model").write_bytes(saved_files(trained)["spiece.model"])
        (config,) = {run.data.tokenizer for run in study.arms.values()}
        tokenizer = dataclasses.replace(config, path=f"{raw}/spiece.model")
        study = study.edited(lambda run: with_data(run, tokenizer=tokenizer))
    here = opened(study)
    expected = here.train.batch(3).fingerprint, here.content_id, here.tokenizer.content_hash
    texts = {name: test.texts() for name, test in open_tests(study.arms["gpt"], here.tokenizer).items()}
    to = "memory://bucket/enough" if kind == "url" else str(tmp_path / "prepared")
    shown(study, workers=1, to=to)
    raw.rename(tmp_path / "away")
    monkeypatch.setenv("TWINSTACK_CACHE", str(tmp_path / "other"))
    with pytest.raises(UserError, match="spiece.model" if loaded else "has no split 'train'"):
        opened(study)
    monkeypatch.setenv(VARIABLE, to)
    there = opened(study)
    assert (there.train.batch(3).fingerprint, there.content_id, there.tokenizer.content_hash) == expected
    assert {name: test.texts() for name, test in open_tests(study.arms["gpt"], there.tokenizer).items()} == texts
    assert there.validation.batch(0).examples > 0
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["plans", "prepared"]
    fsspec.filesystem("memory").store.clear()


def test_damaged_files_of_prepared_data_are_errors(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown(study, workers=1, to=str(tmp_path / "prepared"))
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "prepared"))
    monkeypatch.setenv("TWINSTACK_CACHE", str(tmp_path / "other"))
    for kind in ("tokenizers", "sources"):
        for file in (tmp_path / "prepared" / kind).glob("*.json"):
            file.write_text(file.read_text().replace("0", "1").replace("A", "B"))
        with pytest.raises(UserError, match="is damaged"):
            opened(study)


def test_beam_writes_the_same_files(study: Study, tmp_path: Path) -> None:
    pytest.importorskip("apache_beam", reason="Apache Beam is optional: pip install apache-beam")
    found = {}
    for name, beam in (("here", None), ("beam", ["--runner=DirectRunner"])):
        shown(study, workers=1, to=str(tmp_path / name), beam=beam)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file() and path.suffix != ".lock"]
        found[name] = {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files}
    assert found["here"] == found["beam"] and len(found["here"]) == 3 * (4 + 2) + 3 + 1


PROGRAM = """
import sys, time
from pathlib import Path
from rich.console import Console
from common.data.tokenized import prepare
from experiments.cli.prepare_data import prepare_data
from experiments.running.scored_splits import open_tests
from tests.experiments.tiny_study import tiny_study

def slowly(number, task, folder, tick, write=prepare.write_shard):
    report = write(number, task, folder, tick)
    print(number, flush=True)
    time.sleep(0.2)
    return report

prepare.write_shard = slowly
prepare.ShardTask.shards = lambda task: 8
prepare_data(tiny_study(Path(sys.argv[1])), Console(stderr=True), workers=1)
"""


def test_a_killed_command_resumes_after_its_finished_shards(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
    assert process.stdout is not None
    while process.stdout.readline() != "3\n":
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    monkeypatch.setattr(module.ShardTask, "shards", lambda task: 8)
    made: list[tuple[int, bool]] = []
    write = module.write_shard

    def recorded(number: int, task: module.ShardTask, folder: Path, *rest: object) -> module.ShardReport:
        made.append((number, (folder / f"{number:05d}.json").exists()))
        return write(number, task, folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_shard", recorded)
    shown(study, workers=1)
    assert made[:8] == [(number, number < 4) for number in range(8)], "the first four shards were finished"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepar", "tiny"], "unknown action 'prepar': did you mean 'prepare'?"),
        (["prepare", "tny"], "did you mean 'tiny'?"),
        (["prepare", "tiny", "--workers", "0"], "--workers is 0: it must be 1 or more"),
        (["prepare", "tiny", "--worker", "2"], "unknown option '--worker': did you mean '--workers'?"),
        (["prepare", "tiny", "data.source.train_split=trian"], "'trian'"),
        (["prepare", "tiny", 'evaluation.splits=["tset"]'], "has no split 'tset'"),
        (["prepare", "tiny", "--to", "nosuch://x"], "unknown protocol"),
        (["prepare", "tiny", "--to", "{folder}/train.jsonl/x"], "train.jsonl is a file"),
        (["prepare", "tiny", "--beam", "--runner=DirectRunner"], "--beam needs a folder or url"),
        (["show", "tiny", "--to", "x"], "--to is for `twinstack data prepare`, not for show"),
        (["show", "tiny", "--workers", "2"], "--workers is for `twinstack data prepare`, not for show"),
    ],
)
def test_mistakes_are_one_line(
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(find, "OWN", ("tiny",))
    monkeypatch.setattr(find, "load", lambda name: study)
    assert main(["data", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error


def test_the_command_prints_the_table(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(find, "OWN", ("tiny",))
    monkeypatch.setattr(find, "load", lambda name: study)
    assert main(["data", "prepare", "tiny", "--workers", "1", "data.rows=8"]) == 0
    captured = capsys.readouterr()
    assert [row[0] for row in rows(captured.out)] == ["train", "validation", "test"] and not captured.err
