"""Small files, written whole or not at all."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.json_text import parse_json
from common.paths import descriptor, is_special

MOST_PIPED = 2**28
"""Bytes that are read of what has no size, such as a pipe; a device may have no end."""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name in the same folder, then renames; readers see the old file or the new one.

    A link stays, and what it leads to is replaced. Something that is no regular file, such as a device or a pipe, is
    written to.
    """
    if is_special(path):
        _write_to(path, data)
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not under its own name, which may be as long as names may be.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _write_to(path: Path, data: bytes) -> None:
    number = descriptor(path)
    sys.stdout.flush()
    with open(path if number is None else os.dup(number), "wb") as file:
        file.write(data)


def plain_name(name: Any, where: str) -> str:
    """`name`, which a manifest or an index file gives to a file of its own folder.

    Raises UserError, beginning with `where`, for anything but the name of one file: a path would lead outside.

    >>> plain_name("model.safetensors", "index.json")
    'model.safetensors'
    >>> plain_name("../x", "index.json")
    Traceback (most recent call last):
        ...
    common.errors.UserError: index.json names '../x', which is outside its folder or no plain name
    """
    if not _is_plain(name):
        raise UserError(f"{where} names {name!r}, which is outside its folder or no plain name")
    return name


def inside(folder: Path, path: Any, where: str) -> Path:
    """The file of `folder` that a manifest names by a path of plain names; raises UserError as `plain_name` does.

    >>> inside(Path("model"), "source/spiece.model", "model.json").as_posix()
    'model/source/spiece.model'
    """
    if not isinstance(path, str) or not all(map(_is_plain, path.split("/"))):
        raise UserError(f"{where} names {path!r}, which is outside its folder or no plain name")
    return folder / path


def _is_plain(name: Any) -> bool:
    plain = isinstance(name, str) and name not in ("", ".", "..") and name.isprintable()
    return plain and not set(name) & set("/\\")


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Raises UserError naming a file that is absent or not JSON, or in which an object has a key twice."""
    try:
        return parse_json(_bytes(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def _bytes(path: Path) -> bytes:
    """All of a file. Raises UserError for a device or a pipe that does not end."""
    if not is_special(path):
        return path.read_bytes()
    with path.open("rb") as file:
        data = file.read(MOST_PIPED + 1)
    if len(data) > MOST_PIPED:
        raise UserError(f"{path} is no regular file, and more than {MOST_PIPED // 2**20} MiB come out of it")
    return data


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`; also raises UserError if the file holds anything but a JSON object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a JSON-lines file of our own (a killed writer may leave half a line); an absent file has none.

    Users' files are read by `user_rows`.
    """
    if not path.exists():
        return []
    try:
        # Not splitlines, which also splits at U+2028 and its like inside a text.
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
        rows = [parse_json(line, finite=False) for line in whole]
    except ValueError as error:
        raise UserError(f"{path} is no file of JSON lines ({error})") from None
    if other := [number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)]:
        raise UserError(f"{path}, line {other[0]} is no JSON object")
    return rows


def split_lines(text: str) -> list[str]:
    """The lines of a user's text: the last may lack its newline, and a byte order mark at its head is no text.

    >>> split_lines("\\ufeffone\\r\\n\\ntwo\\u2028still two")
    ['one', '', 'two\\u2028still two']
    """
    text = text.removeprefix("\ufeff").removesuffix("\n")
    # Not splitlines, which also splits at U+2028 and its like.
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def user_lines(path: Path) -> list[str]:
    """The lines of a user's text file, by `split_lines`. Raises UserError naming a file that cannot be read."""
    try:
        data = _bytes(path)
        return split_lines(data.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} cannot be read: it is not UTF-8 ({error.reason})") from None


def user_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a user's JSON-lines file. Raises UserError naming the line that holds none."""
    return [_row(f"{path}, line {number}", line) for number, line in enumerate(user_lines(path), 1)]


def _row(where: str, line: str) -> dict[str, Any]:
    if not line.strip():
        raise UserError(f"{where} is blank, where a JSON object is due")
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, not {type(row).__name__}")
    return row
