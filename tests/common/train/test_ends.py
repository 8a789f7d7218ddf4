"""Runs that hang, and runs that are asked to end while their main thread is blocked."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.data.batch import HostBatch
from common.train import watchdog
from common.train.config import Patience
from common.train.loop import fit
from common.train.preemption import STATUS
from common.train.task import Stream
from common.train.watchdog import STALLED, watched
from tests.tiny import Observer, loader, task

ROOT = Path(__file__).parents[3]
HANG = """
import sys, threading, time
from pathlib import Path
from common.train.watchdog import watched
def waits_forever_for_a_batch(): time.sleep(600)
threading.Thread(target=waits_forever_for_a_batch, daemon=True).start()
with watched(Path(sys.argv[1]), 0.5) as alive:
    for _ in range(8):
        alive(); time.sleep(0.2)
    print("moved", flush=True)
    waits_forever_for_a_batch()
"""
BLOCKED = """
import contextlib, hashlib, sys
from common.train.preemption import Preemption
with contextlib.closing(Preemption(float(sys.argv[1]), lambda: "last words")) as preemption:
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))  # in C: no Python handler runs meanwhile
    print(preemption.requested(), flush=True)
"""


def program(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_that_hangs_is_ended_with_its_stacks(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks.txt"
    with program(HANG, str(stacks)) as process:
        output, errors = process.communicate(timeout=60)
    assert output == "moved\n" and process.returncode == STALLED == 75
    assert f"no progress for 0.5 s; the stacks of all threads are in {stacks}" in errors
    for found in (stacks.read_text(), errors):
        assert found.count("waits_forever_for_a_batch") == 2  # in the main thread and in the other one


def test_a_run_that_ends_is_not_watched_any_more(tmp_path: Path) -> None:
    with watched(tmp_path / "stacks.txt", 0.05) as alive:
        alive()
    time.sleep(0.2)  # otherwise this process would have ended
    assert not (tmp_path / "stacks.txt").exists()


@dataclasses.dataclass
class Stuck:
    """A stream that blocks before one of its batches until it is let go."""

    stream: Stream
    step: int
    let_go: threading.Event

    @property
    def content(self) -> str:
        return self.stream.content

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        for step, host in enumerate(self.stream.iterate(start, stop), start=start + 1):
            if step == self.step:
                assert self.let_go.wait(60)
            yield host


def test_a_stream_that_hangs_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop sends a heartbeat at each step, and none while it waits for a batch."""
    begun, let_go, steps = Observer(), threading.Event(), []

    def end(stacks: Path, stall_seconds: float) -> None:
        if begun.steps:  # compiling may also take longer
            steps.append(begun.steps[-1])
            assert stacks == tmp_path / "stacks-0.txt" and stall_seconds == 0.5
            let_go.set()
        time.sleep(0.05)

    monkeypatch.setattr(watchdog, "_end", end)
    patience = Patience(stall_seconds=0.5, storage_seconds=0.1)
    fit(task("gpt", Stuck(loader(), 5, let_go), patience=patience), tmp_path, begun)
    assert begun.steps == list(range(1, 9)) and steps[0] in (3, 4)


@pytest.mark.parametrize("twice", [False, True])
def test_ctrl_c_is_deferred_and_a_second_one_ends_at_once(twice: bool) -> None:
    with program(BLOCKED, "60", str(10**9 if twice else 10**6)) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None and process.stderr.readline() == "\n"
        assert (
            process.stderr.readline() == "twinstack: saving after the current step; press Ctrl-C again to end at once\n"
        )
        if twice:
            process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    if twice:
        assert (process.returncode, output) == (130, "")
        assert errors.strip() == "twinstack: ended at once; last words"
    else:
        assert (process.returncode, output, errors) == (0, "True\n", "")


@pytest.mark.parametrize("grace", ["0.5", "60"])
def test_sigterm_ends_a_process_in_time(grace: str) -> None:
    """During a long call of C code in the main thread: by force when the grace is over, else when the call returns."""
    with program(BLOCKED, grace, str(10**9 if grace == "0.5" else 10**6)) as process:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        output, errors = process.communicate(timeout=60)
        if grace == "0.5":
            assert process.returncode == STATUS == 143 and output == ""
            assert errors.strip() == "twinstack: asked to end 0.5 s ago; last words"
            assert time.monotonic() - sent < 30
        else:
            assert (process.returncode, output, errors) == (0, "True\n", "")
