"""A file of JSON rows, one a line, that training appends to."""

import io
import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_rows, write_rows


class JsonLines:
    """A file to which one row per step is appended; a row is whole or absent."""

    def __init__(self, path: Path, *, keep_through_step: int):
        """Drops rows with a later `step` and a half-written last line, so that new rows follow step by step."""
        rows = [row for row in read_rows(path) if _step(row, path) <= keep_through_step]
        self.lost = sorted({*range(1, keep_through_step + 1)} - {row["step"] for row in rows})
        """Steps up to `keep_through_step` whose rows are missing."""
        write_rows(path, rows)
        self.path, self._bytes, self._pending = path, path.stat().st_size, b""
        self._file: io.FileIO | None = None

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row. Raises OSError if the disk refuses; the row is then kept until the next `flush`."""
        self._pending += json.dumps(row).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Hands all rows to the operating system. Raises UserError if another program has changed the file."""
        while self._pending:
            if self._file is None:
                self._check()
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by `secure` and `close`)
            written = self._file.write(self._pending)
            self._pending, self._bytes = self._pending[written:], self._bytes + written

    def secure(self) -> None:
        """Returns once all rows survive the end of the process or the machine.

        Closes the file until the next row, since some mounts upload a file when it is closed. Raises as `flush` does.
        """
        self.flush()
        if self._file is not None:
            os.fsync(self._file.fileno())
            self.close()
        self._check()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _check(self) -> None:
        """Raises UserError if the file has another size than this object has written."""
        found = self.path.stat().st_size if self.path.is_file() else None
        if found != self._bytes:
            now = "is gone" if found is None else f"has {found:,} bytes instead of {self._bytes:,}"
            raise UserError(
                f"{self.path} {now}: another program removed or changed it during the run; stopped; repeat the command "
                "to resume from the newest checkpoint that is left"
            )


def _step(row: dict[str, Any], path: Path) -> int:
    step = row.get("step")
    if not isinstance(step, int):
        raise UserError(f"{path} has a row without a step ({json.dumps(row):.80}): restore it, or remove it")
    return step
