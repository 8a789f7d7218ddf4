"""Reads and writes small files; a file is written whole or not at all."""

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
"""Most bytes to read from something without a size, such as a pipe or a device, which may never end."""


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name in the same folder, then renames: readers see the old file or the new one.

    If `path` is a symbolic link, its target is replaced. A device, pipe or socket is written to directly.
    """
    if is_special(path):
        _write_directly(path, data)
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    # The prefix is shortened, because the file's own name may already have the greatest length.
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


def _write_directly(path: Path, data: bytes) -> None:
    number = descriptor(path)
    sys.stdout.flush()
    with open(path if number is None else os.dup(number), "wb") as file:
        file.write(data)


def plain_name(name: Any, where: str) -> str:
    """Returns `name`, a file name read from a manifest or an index, if it names one file in the same folder.

    Raises UserError, with `where` in front, for anything else: a path could lead outside the folder.

    >>> plain_name("model.safetensors", "index.json")
    'model.safetensors'
    >>> plain_name("../x", "index.json")
    Traceback (most recent call last):
        ...
    common.errors.UserError: index.json names '../x', which is outside its folder or not a plain name
    """
    if not _is_plain(name):
        raise UserError(f"{where} names {name!r}, which is outside its folder or not a plain name")
    return name


def inside(folder: Path, path: Any, where: str) -> Path:
    """Returns the file in `folder` that a manifest names by a relative path; raises UserError as `plain_name` does.

    >>> inside(Path("model"), "source/spiece.model", "model.json").as_posix()
    'model/source/spiece.model'
    """
    if not isinstance(path, str) or not all(map(_is_plain, path.split("/"))):
        raise UserError(f"{where} names {path!r}, which is outside its folder or not a plain name")
    return folder / path


def _is_plain(name: Any) -> bool:
    plain = isinstance(name, str) and name not in ("", ".", "..") and name.isprintable()
    return plain and not set(name) & set("/\\")


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Reads a JSON file. Raises UserError naming the file if it is absent, or if `parse_json` refuses it."""
    try:
        return parse_json(_read_bytes(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def _read_bytes(path: Path) -> bytes:
    """Reads a whole file. Raises UserError for a device or pipe that yields more than MOST_PIPED bytes."""
    if not is_special(path):
        return path.read_bytes()
    with path.open("rb") as file:
        data = file.read(MOST_PIPED + 1)
    if len(data) > MOST_PIPED:
        raise UserError(f"{path} is not a regular file, and yields more than {MOST_PIPED // 2**20} MiB")
    return data


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file as `read_json` does; also raises UserError if it holds anything but an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return value


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the complete lines of a JSON-lines file that this program wrote; an absent file has none.

    A killed writer may leave an incomplete last line, which is ignored. Files from users are read by `user_rows`.
    """
    if not path.exists():
        return []
    try:
        # Not splitlines, which also splits at U+2028 and similar characters inside a text.
        *complete, _ = path.read_text(encoding="utf-8").split("\n")
        rows = [parse_json(line, finite=False) for line in complete]
    except ValueError as error:
        raise UserError(f"{path} is not a JSON-lines file ({error})") from None
    if other := [number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)]:
        raise UserError(f"{path}, line {other[0]} is not a JSON object")
    return rows


def split_lines(text: str) -> list[str]:
    """Splits a user's text into lines; ignores a byte order mark at the start. The last line may lack its newline.

    >>> split_lines("\\ufeffone\\r\\n\\ntwo\\u2028still two")
    ['one', '', 'two\\u2028still two']
    """
    text = text.removeprefix("\ufeff").removesuffix("\n")
    # Not splitlines, which also splits at U+2028 and similar characters.
    return [line.removesuffix("\r") for line in text.split("\n")] if text else []


def user_lines(path: Path) -> list[str]:
    """Reads the lines of a user's text file. Raises UserError naming a file that cannot be read."""
    try:
        data = _read_bytes(path)
        return split_lines(data.decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line} cannot be read: it is not UTF-8 ({error.reason})") from None


def user_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a user's JSON-lines file. Raises UserError naming the first line that is not an object."""
    return [_parse_row(f"{path}, line {number}", line) for number, line in enumerate(user_lines(path), 1)]


def _parse_row(where: str, line: str) -> dict[str, Any]:
    if not line.strip():
        raise UserError(f"{where} is blank: a JSON object was expected")
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, not {type(row).__name__}")
    return row
