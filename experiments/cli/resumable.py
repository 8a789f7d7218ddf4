"""A file of generated texts that a killed command can resume."""

import json
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_rows, write_rows


class ResumableOutput:
    """A JSON-lines file, and until it is complete a second file beside it with the rows so far, in any order.

    Every row contains `settings`, which must be equal in both files and in this command.
    """

    def __init__(self, out: Path, settings: str, count: int):
        """`count`: number of rows of the complete file. Raises UserError where `out` has other rows."""
        self._out, self._settings = out, settings
        self._path = out.with_name(f"{out.name}.partial")
        found = read_rows(out)
        if found and (len(found) != count or any(row.get("settings") != settings for row in found)):
            raise UserError(f"{out} exists, from another model, other prompts or other options: remove it")
        self.complete = bool(found)

    def finished_rows(self) -> dict[int, Any]:
        """Returns the rows so far by index, and keeps them for `add` to append to."""
        rows = read_rows(self._path)
        if any(row.get("settings") != self._settings for row in rows):
            raise UserError(f"{self._path} is from another model, other prompts or other options: remove it")
        write_rows(self._path, rows)  # without the incomplete line that a killed command may have left
        return {row["index"]: row for row in rows}

    def add(self, row: dict[str, Any]) -> None:
        row["settings"] = self._settings
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Writes the complete file and removes the partial one."""
        write_rows(self._out, rows)
        self._path.unlink(missing_ok=True)
