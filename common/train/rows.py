"""Files of rows that training appends to, a JSON object a line."""

import io
import json
import os
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import read_rows, write_rows


class JsonLines:
    """A file of one row a step, appended to; a row is whole or absent."""

    def __init__(self, path: Path, *, keep_through_step: int):
        """Drops rows with a later `step`, and a half-written last line, before anything is appended."""
        rows = [row for row in read_rows(path) if _step(row, path) <= keep_through_step]
        self.lost = sorted({*range(1, keep_through_step + 1)} - {row["step"] for row in rows})
        """Steps before the first that is appended whose rows are not there."""
        write_rows(path, rows)
        self.path, self._bytes, self._pending = path, path.stat().st_size, b""
        self._file: io.FileIO | None = None

    def write(self, row: dict[str, Any]) -> None:
        """Raises OSError where the disk refuses; what it refused is kept, and written by the next `flush`."""
        self._pending += json.dumps(row).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Hands all rows to the system. Raises UserError where the file is not as it was left."""
        while self._pending:
            if self._file is None:
                self._check()
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by `secure` and `close`)
            written = self._file.write(self._pending)
            self._pending, self._bytes = self._pending[written:], self._bytes + written

    def secure(self) -> None:
        """Returns once all rows are where no end of the process or the machine can take them.

        The file is closed until the next row: some mounts upload it then. Raises as `flush` does.
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
        found = self.path.stat().st_size if self.path.is_file() else None
        if found != self._bytes:
            now = "is gone" if found is None else f"has {found:,} bytes instead of {self._bytes:,}"
            raise UserError(
                f"{self.path} {now}: something else removed or changed it while the run went on; stopped, the same "
                "command goes on from the newest checkpoint that is left"
            )


def _step(row: dict[str, Any], path: Path) -> int:
    step = row.get("step")
    if not isinstance(step, int):
        raise UserError(f"{path} has a row without a step ({json.dumps(row):.80}): restore it, or remove it")
    return step
