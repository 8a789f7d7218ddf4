"""Progress bars, with and without a terminal."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from common.progress import ProgressBars, counter, spinner, tracked


def console_of(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds it 3 seconds later."""

    def times() -> Iterator[float]:
        now = 1000.0
        while True:
            now += 3.0
            yield now

    clock = times()
    monkeypatch.setattr("common.progress.time.monotonic", lambda: next(clock))


@pytest.mark.usefixtures("slow_clock")
def test_without_a_terminal_a_line_is_printed_now_and_then() -> None:
    console = console_of(terminal=False)
    progress = ProgressBars(console)
    progress.say("[not markup]")
    with progress.bar("decoding", 40) as advance:
        for _ in range(30):
            advance(1)
    assert shown(console).splitlines() == ["[not markup]", "decoding: 11 of 40", "decoding: 22 of 40"]


@pytest.mark.usefixtures("slow_clock")
def test_on_a_terminal_no_lines_are_printed() -> None:
    console = console_of(terminal=True)
    progress = ProgressBars(console)
    progress.say("[not markup]")
    with progress.bar("decoding", 40) as advance:
        for _ in range(30):
            advance(1)
    assert "of 40" not in shown(console) and "markup" not in shown(console)
    assert "decoding" in shown(console) and "30/40" in shown(console)


def test_controls_and_markup_in_titles_are_shown_as_characters() -> None:
    """Titles may come from data, paths and files."""
    console = console_of(terminal=True)
    with ProgressBars(console).bar("[/red]a\x1b[2J\u202e", 2) as advance:
        advance(1)
    assert r"a\u001b[2J\u202e" in shown(console) and "\u202e" not in shown(console)


def test_nothing_is_shown_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with counter("counting", 3) as advance, spinner("waiting"):
        advance(2)
    assert list(tracked([5, 6, 7], "tracking")) == [5, 6, 7]
    assert capfd.readouterr() == ("", "")
