"""What the console shows of a run, with and without a terminal."""

import datetime
import io
import logging
import re
from typing import Any

import pytest
from rich.console import Console

from experiments.running.console import LINE_SECONDS, Harmless, training_bar

STEPS = 1000


class Shown:
    """A console that writes to memory, and a clock that the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, terminal: bool):
        self.now = 1000.0
        monkeypatch.setattr("experiments.running.console.time.monotonic", lambda: self.now)
        monkeypatch.setattr("experiments.running.console.time.time", lambda: 0.0)
        monkeypatch.setattr("experiments.running.console.time.localtime", lambda seconds: _utc(seconds))
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=160)

    def step(self, bar: Any, step: int, seconds: float, **more: Any) -> None:
        self.now += seconds
        timing = {"step": step, "step_seconds": seconds, "tokens_per_second": 500.0, "seconds": step * seconds}
        timing |= {"data_seconds": 0.0, "checkpoint_seconds": 0.0, "eval_seconds": 0.0, "goodput": 0.75}
        row = {"step": step, "loss": 2.5}
        bar.step({**row, **{key: value for key, value in more.items() if key == "validation_loss"}}, {**timing, **more})

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()


def _utc(seconds: float) -> Any:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).timetuple()


def test_without_a_terminal_plain_lines_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They contain what the status line does, and the time of day at which training ends."""
    shown = Shown(monkeypatch, terminal=False)
    with training_bar(shown.console, "gpt") as bar:
        bar.begin(400, STEPS)
        for step in range(401, 501):
            shown.step(bar, step, 1.0, mfu_causal_half=0.314)
    assert len(shown.lines) == int(100 / (LINE_SECONDS + 1))
    assert shown.lines[0] == (
        "gpt: step 431/1000  loss 2.500  500 tokens/s  MFU 31.4% (causal half)  9 min 29 s left, until 00:09"
    )
    assert "\x1b" not in shown.file.getvalue()


def test_the_last_line_has_the_shares_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch, terminal=False)
    with training_bar(shown.console, "gpt") as bar:
        bar.begin(0, 2)
        shown.step(bar, 1, 1.0)
        shown.step(bar, 2, 1.0, validation_loss=2.25)
    assert shown.lines == [
        "gpt: step 2/2  loss 2.500  500 tokens/s  validation 2.2500  2 s",
        "gpt: time: 0.0% data, 100.0% compute, 0.0% checkpoint, 0.0% eval; goodput since the first launch 75%",
    ]


def test_in_a_terminal_the_status_line_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only validation losses and notes remain."""
    shown = Shown(monkeypatch, terminal=True)
    with training_bar(shown.console, "gpt") as bar:
        bar.begin(0, STEPS)
        for step in range(1, 100):
            shown.step(bar, step, 1.0)
        bar.note("[not markup]")
    text = re.sub(r"\x1b\[[\d;]*m", "", shown.file.getvalue())  # without colours
    assert "step 31/1000" not in text and "500 tokens/s" in text and "gpt: [not markup]" in text


def test_a_skipped_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(monkeypatch, terminal=False)
    with training_bar(shown.console, "gpt") as bar:
        bar.begin(0, 1)
        bar.step({"step": 1, "skipped": "loss nan"}, _timing())
    assert shown.lines == ["gpt: time: 0.0% data, 0.0% compute, 0.0% checkpoint, 0.0% eval; " + _GOODPUT]


_GOODPUT = "goodput since the first launch 0%"


def _timing() -> dict[str, float]:
    return dict.fromkeys(("seconds", "data_seconds", "checkpoint_seconds", "eval_seconds", "goodput"), 0.0)


def test_control_characters_and_markup_in_names_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes, titles of bars and names of arms come from data, paths and files."""
    evil, seen = "[/red]a\x1b[2J\u202e", r"[/red]a\u001b[2J\u202e"
    shown = Shown(monkeypatch, terminal=False)
    with training_bar(shown.console, evil) as bar:
        bar.note(evil)
        bar.begin(0, STEPS)
        shown.step(bar, 1, 1.0, validation_loss=1.0)
    assert shown.lines[-2] == f"{seen}: {seen}" and shown.lines[-1].startswith(f"{seen}: step 1/{STEPS}")


def test_control_characters_in_log_lines_are_escaped() -> None:
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "%s cannot be read", ("a\x1b[2J",), None)
    assert Harmless("%(message)s").format(record) == r"a\u001b[2J cannot be read"
