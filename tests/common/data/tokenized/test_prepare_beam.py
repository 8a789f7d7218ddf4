"""Apache Beam makes the same files as the processes of one machine."""

import logging
import sys
from pathlib import Path

import pytest

from common.data.config import SentencePieceConfig
from common.data.sources.records import Problem, Record
from common.data.tokenized import prepare as module
from common.data.tokenized.beam import parse_options, prepare_with_beam
from common.data.tokenized.prepare import Folder, prepare
from common.data.tokenized.remote import destination
from common.data.tokenized.shards import ShardTask
from common.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_model
from common.errors import UserError
from tests.common.data.memory_source import MemorySource

HERE = ("--runner=DirectRunner",)


def task_of(strict: bool = False) -> ShardTask:
    lines = [f"{n} is {n + 1} less one" for n in range(300)]
    records: list[Record | Problem] = [{"text": line} for line in lines]
    records[3], records[150] = Problem("x.jsonl line 4", "not JSON"), {"text": ""}
    tokenizer = SentencePieceTokenizer(train_model(lines, SentencePieceConfig(vocab_size=277)))
    return ShardTask(
        source=MemorySource(records),
        fields=("text",),
        tokenizer=tokenizer,
        end_each=False,
        strict=strict,
        records_a_shard=32,
    )


def here(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_error_without_beam_names_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    with pytest.raises(UserError, match="Apache Beam is not installed: pip install apache-beam"):
        prepare_with_beam(task_of(), Folder(tmp_path / "a"), HERE)
    assert not list(tmp_path.iterdir())


class TestWithBeam:
    @pytest.fixture(autouse=True)
    def beam(self) -> None:
        pytest.importorskip("apache_beam", reason="Apache Beam is optional: pip install apache-beam")

    @pytest.mark.parametrize("protocol", ["", "file://"])
    def test_the_same_bytes(self, tmp_path: Path, protocol: str, caplog: pytest.LogCaptureFixture) -> None:
        task = task_of()
        prepare(task, tmp_path / "here", workers=1)
        there = destination(f"{protocol}{tmp_path}/there", task)
        with caplog.at_level(logging.INFO, logger="common.data.tokenized.beam"):
            manifest = prepare_with_beam(task, there, HERE)
        assert here(tmp_path / "there" / task.key()) == here(tmp_path / "here")
        assert (manifest["records"], manifest["kept"], manifest["empty"]) == (300, 299, 1)
        assert "Beam counted 300 records, 299 kept, 1 problems" in caplog.messages
        caplog.clear()
        assert prepare_with_beam(task, there, HERE) == manifest and not caplog.messages, "everything is there"

    def test_it_continues_what_one_machine_began(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        task, there = task_of(), Folder(tmp_path / "there")
        for shard in (0, 4):
            there.write(shard, task, lambda done: None)
        task.source.reads = 0  # type: ignore[misc]
        prepare_with_beam(task, there, HERE)
        monkeypatch.setattr(module, "write_shard", None)
        assert prepare(task, tmp_path / "there").manifest["kept"] == 299

    def test_an_unusable_record_stops_a_strict_task(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as stopped:
            prepare_with_beam(task_of(strict=True), Folder(tmp_path / "a"), HERE)
        assert str(stopped.value) == "the Beam pipeline failed: x.jsonl line 4: not JSON"
        assert not (tmp_path / "a").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--runnr=DirectRunner"], "Beam has no option --runnr; did you mean 'runner'?"),
            (["--runner"], "Beam's options: argument --runner: expected one argument"),
            (["--runner=DirectRunner", "data.rows=4"], "'data.rows=4' is not an option of Beam"),
            (["--xyzxyz"], "Beam has no option --xyzxyz"),
        ],
    )
    def test_unknown_options_are_refused(
        self, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(UserError) as refused:
            parse_options(options)
        assert str(refused.value).startswith(message) and len(str(refused.value)) < 200
        assert not capsys.readouterr().err

    def test_a_runner_that_cannot_start_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="the Beam pipeline failed: "):
            prepare_with_beam(task_of(), Folder(tmp_path / "a"), ["--runner=nosuch.Runner"])
