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


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises UserError naming a file that is absent or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a JSON-lines file (a killed writer may leave half a line); an absent file has none."""
    if not path.exists():
        return []
    try:
        # Not splitlines, which also splits at U+2028 and its like inside a text.
        *whole, _ = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise UserError(f"{path} is no file of JSON lines ({error})") from None
