"""Kills runs of `tiny_study` at random moments and relaunches them until they finish.

Arguments: FOLDER ARM RUN_DIR KILLS SEED. Launches are forks of one process that has imported everything, so that most
of their time is training. Prints a JSON object for each launch.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from common.train.run_files import RunFiles
from tests.experiments.tiny_study import main as train

SPAN_SECONDS = 0.7
"""A kill comes at most this long after training has begun."""
PATIENCE = 120.0


def launch(folder: Path, arm: str, run_dir: Path) -> tuple[int, int]:
    """Returns the process id and the file descriptor of the process's standard output."""
    reading, writing = os.pipe()
    if process := os.fork():
        os.close(writing)
        return process, reading
    os.close(reading)
    os.dup2(writing, sys.stdout.fileno())
    status = 1
    try:
        train(folder, arm, run_dir)
        status = 0
    except SystemExit as end:
        status = int(str(end.code))
    finally:
        sys.stdout.flush()
        os._exit(status)


def saving(checkpoints: Path) -> bool:
    return checkpoints.is_dir() and any("tmp" in path.name for path in checkpoints.iterdir())


def ended(process: int) -> bool:
    """Whether the process has ended; it can still be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main(folder: Path, arm: str, run_dir: Path, kills: int, seed: int) -> None:
    """Finishes runs in `run_dir`/0, 1, ...; starts another one while there have been fewer than `kills` kills."""
    rng, done, run = random.Random(seed), 0, 0
    while done < kills:
        folder_of_run, status = run_dir / str(run), 1
        while status != 0:
            process, output = launch(folder, arm, folder_of_run)
            with os.fdopen(output) as lines:
                begun = any(line == "begin\n" for line in lines)
                how = (
                    random_kill(rng, process, folder_of_run / arm / RunFiles.CHECKPOINTS)
                    if begun and done < kills
                    else None
                )
                sent = time.monotonic()
                lines.read()
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            done += status != 0
            report = {"run": run, "signal": how, "status": status, "seconds": time.monotonic() - sent}
            print(json.dumps(report), flush=True)
            assert status == 0 or how is not None, "the run failed without a kill"
        run += 1


def random_kill(rng: random.Random, process: int, checkpoints: Path) -> str:
    """Kills the process after a random time, or during its next save; returns the signal's name."""
    end = time.monotonic() + rng.uniform(0.0, SPAN_SECONDS)
    if rng.random() < 0.4:
        give_up = time.monotonic() + PATIENCE
        while not saving(checkpoints) and not ended(process):
            assert time.monotonic() < give_up
            time.sleep(0.0005)
        end = time.monotonic() + rng.uniform(0.0, 0.01)
    time.sleep(max(0.0, end - time.monotonic()))
    how = rng.choice([signal.SIGKILL, signal.SIGTERM])
    os.kill(process, how)
    return how.name


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
