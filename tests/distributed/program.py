"""The command line with one more study, `tiny`, over local files: `FOLDER HEARTBEAT_SECONDS ARGUMENTS...`."""

import sys
import time
from pathlib import Path
from typing import Any

import jax

from common.train import distributed, run
from experiments import find
from experiments.cli import main as cli
from experiments.running.console import TrainingBar
from tests.experiments.tiny_study import tiny_study


def take_time(bar: TrainingBar, row: dict[str, Any], timing: dict[str, Any], step: Any = TrainingBar.step) -> None:
    """Delays each step, so that a test has time to kill the process."""
    time.sleep(0.05)
    step(bar, row, timing)


def print_writes(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook that prints every file that Python itself opens for writing, makes, renames or removes."""
    opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if opened or event in ("os.mkdir", "os.rename", "os.remove"):
        sys.stdout.write(f"writes {arguments[0]}\n")


def main(folder: Path, heartbeat_seconds: int, arguments: list[str]) -> int:
    jax.config.update("jax_default_matmul_precision", "highest")
    distributed.HEARTBEAT_SECONDS = heartbeat_seconds
    run.SHARED_STORAGE_SECONDS = 1.0
    study = tiny_study(folder)
    find.OWN = (study.name,)
    find.load = lambda name: study
    TrainingBar.step = take_time  # type: ignore[method-assign]
    sys.addaudithook(print_writes)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
