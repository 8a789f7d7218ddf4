"""Files, paths, JSON and terminal text from users: what is written, read, escaped and refused."""

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import files
from common.errors import UserError
from common.files import read_json, user_lines, write_atomically
from common.json_text import DEEPEST, MOST_DIGITS, parse_json
from common.paths import as_user_error, check_file, check_folder, is_special, user_path
from common.terminal import harmless, marked_up

SHOWN = {
    "\x1b[2J": r"\u001b[2J",
    "\x1b]0;owned\x07": r"\u001b]0;owned\u0007",
    "\x9b2J": r"\u009b2J",
    "a\u202eb\u2066c": r"a\u202eb\u2066c",
    "\u2028": r"\u2028",
    "\ud800": r"\ud800",
    "tab\tnew\nline é 漢 🙂 👩\u200d🚀 می\u200cخواهم": "tab\tnew\nline é 漢 🙂 👩\u200d🚀 می\u200cخواهم",
}


@pytest.mark.parametrize(("text", "shown"), SHOWN.items())
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert harmless(text) == shown and harmless(shown) == shown
    assert marked_up(f"[red]{text}") == rf"\[red]{shown}"


def test_escaped_json_describes_the_same_value() -> None:
    text = "".join(SHOWN).replace("\ud800", "")
    written = harmless(f'"{text}"'.replace("\t", " ").replace("\n", " "))
    assert parse_json(written) == text.replace("\t", " ").replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested"),
        ("[" * 900 + "]" * 900, "nested"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested"),
        ("9" * 5000, "5,000 digits"),
        ("-" + "9" * (MOST_DIGITS + 1), "digits"),
        ('{"a": 1e999}', "too large"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "not a JSON number"),
        ('{"a": {"b": 1, "b": 1}}', "two fields are named 'b'"),
        ('["\\ud83d"]', "surrogate"),
        (b"\xff", "utf-8"),
        (b"\xff\xfe[\x001\x00]\x00", "utf-8"),
        ("[1,]", "Expecting value|Illegal trailing comma"),  # before Python 3.13, and since
    ],
    ids=range(13),
)
def test_hostile_or_invalid_json_is_refused(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parse_json(text)
    assert len(str(refused.value)) < 200
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"a.json cannot be read .*{message}"):
        read_json(path)


def test_json_up_to_the_limits_is_read() -> None:
    assert parse_json("[" * DEEPEST + "]" * DEEPEST) is not None
    assert parse_json("9" * MOST_DIGITS) == 10**MOST_DIGITS - 1
    text = "[" * 1000 + "9" * 5000 + "1e999"
    assert parse_json(f'"{text}"') == text
    assert parse_json(r'["\ud83d\ude42", "\u0000", 1e-999]') == ["🙂", "\0", 0.0]
    assert parse_json("[NaN, 1e999]", finite=False)[1] == float("inf")


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """A device or socket takes the same path: anything that is not a regular file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert is_special(pipe)
    check_file(pipe, "--out")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_atomically(pipe, b"written")
    reader.join(10)
    assert received == [b"written"] and stat.S_ISFIFO(pipe.stat().st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_standard_output_is_written_to(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(1, b"before\n")
    check_file(Path("/dev/stdout"), "--out")
    write_atomically(Path("/dev/stdout"), b"written\n")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "before\nwritten\nafter\n"


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "link", tmp_path / "elsewhere" / "file"
    link.symlink_to(file)
    for content in (b"one", b"two"):  # absent at first
        write_atomically(link, content)
        assert link.is_symlink() and file.read_bytes() == content
    assert os.listdir(file.parent) == ["file"]


def test_a_file_with_the_longest_possible_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    check_file(path, "--out")
    write_atomically(path, b"")
    assert path.exists()


def test_an_endless_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_PIPED", 1000)
    for read in (read_json, user_lines):
        with pytest.raises(UserError, match="/dev/zero is not a regular file"):
            read(Path("/dev/zero"))
    (tmp_path / "file").write_text("x" * 2000)
    assert user_lines(tmp_path / "file") == ["x" * 2000]


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_a_path_without_write_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Path, str], None]
) -> None:
    check(tmp_path / "new" / "one", "--out")
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith(str(tmp_path)))
    with pytest.raises(UserError, match=f"--out .*new/one cannot be created: {tmp_path} may not be written"):
        check(tmp_path / "new" / "one", "--out")
    (tmp_path / "file").write_text("")
    place = tmp_path if check is check_folder else tmp_path / "file"
    with pytest.raises(UserError, match=f"--out {place} cannot be written"):
        check(place, "--out")


def test_a_home_folder_is_expanded_and_invalid_paths_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/runs") == Path("/home/me/runs")
    wrong = {"~nosuchuser/x": "no user 'nosuchuser'", "\udcff": "UTF-8", "a\0": "NUL", "": "empty"}
    for text, message in wrong.items():
        with pytest.raises(UserError, match=message):
            user_path(text)


def test_system_errors_become_user_errors_if_they_are_about_a_users_path(tmp_path: Path) -> None:
    def converted(act: Callable[[], Any]) -> UserError | None:
        with pytest.raises(OSError) as raised:  # noqa: PT011 (any of them)
            act()
        return as_user_error(raised.value)

    (tmp_path / "file").write_text("")
    assert str(converted((tmp_path / "none").read_bytes)) == f"{tmp_path}/none: no such file or directory"
    assert str(converted((tmp_path / "file" / "x").mkdir)) == f"{tmp_path}/file/x: not a directory"
    assert str(converted(tmp_path.read_bytes)) == f"{tmp_path}: is a directory"
    assert "no space left" in str(as_user_error(OSError(28, "No space left on device")))
    assert converted(lambda: os.read(10**6, 1)) is None
    assert converted((Path(files.__file__).parent / "none.txt").read_bytes) is None
