"""Trains a tiny model while no file may grow beyond some bytes: `RUN_DIR BYTES FROM_STEP SECONDS STORAGE_SECONDS`.

The limit holds from a step until SECONDS after the first refusal. The operating system refuses such writes with EFBIG,
as a full disk does with ENOSPC.
"""

import contextlib
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.errors import UserError
from common.train.config import Patience
from common.train.loop import fit
from tests.tiny import task


class Disk:
    """A watcher that limits the size of files for a while, and prints notes."""

    def __init__(self, limit_bytes: int, from_step: int, seconds: float):
        self.limit_bytes, self.from_step, self.seconds = limit_bytes, from_step, seconds
        self.hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        self.timer = threading.Timer(seconds, self._limit, [self.hard])
        self.timer.daemon = True

    def note(self, message: str) -> None:
        print(message, flush=True)
        if "File too large" in message and not self.timer.is_alive():
            with contextlib.suppress(RuntimeError):  # it has started and ended
                self.timer.start()

    def begin(self, step: int, steps: int) -> None:
        pass

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        if row["step"] == self.from_step and self.seconds:
            self._limit(self.limit_bytes)
        time.sleep(0.1)

    def _limit(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.hard))


def main(run_dir: Path, limit_bytes: int, from_step: int, seconds: float, storage_seconds: float) -> int:
    disk = Disk(limit_bytes, from_step, seconds)
    try:
        fitted = fit(task("gpt", patience=Patience(storage_seconds=storage_seconds)), run_dir, disk)
    except UserError as error:
        print(f"error: {error}", flush=True)
        return 2
    finally:
        disk._limit(disk.hard)
    np.savez(run_dir / "params.npz", *map(np.asarray, jax.tree.leaves(fitted.params)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5])))
