"""Small files, written whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from common.errors import UserError


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name in the same folder, then renames; readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_once)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: readers differ in which of two values they take.

    >>> json.loads('{"a": 1, "a": 2}', object_pairs_hook=each_once)
    Traceback (most recent call last):
        ...
    ValueError: 'a' stands there twice
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
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
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise UserError(f"{path} is no file of JSON lines ({error})") from None


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
        data = path.read_bytes()
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
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a JSON object, not {type(row).__name__}")
    return row
