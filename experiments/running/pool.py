"""Runs a study in several worker processes of one machine, each with cores of its own.

Every worker runs the same command and takes the next run whose lock is free. The parent starts them, shows how far they
are, and passes signals on; it trains nothing and imports no JAX.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from common.progress import LINE_SECONDS, rich_bars
from common.report.units import duration
from common.terminal import harmless, marked_up
from experiments.members import Member
from experiments.running.study_folder import Standing, StudyFolder

POLL_SECONDS = 1.0
STOPPING = "stopping: every run is saved after its current step"
MOST_DEATHS = 3
"""How often a worker that died, for lack of memory for example, is started again."""
PARENT_DEATH_SIGNAL = 1
"""Linux: the option of `prctl` that makes the kernel send a signal when the parent ends."""


def be_worker(folder: StudyFolder, arms: Sequence[str], *, number: int, jobs: int, profile_steps: int = 0) -> int:
    """Works on the study as worker `number` of `jobs`, on this worker's cores; returns the exit status."""
    _end_with_parent()
    _take_cores(number, jobs)
    from experiments.running.execute import StudyWorker
    from experiments.running.jax_setup import set_up_jax

    set_up_jax()
    worker = StudyWorker(folder, Console(), arms=arms, profile_steps=profile_steps, patient=True, verifies=number == 0)
    worker.check()
    return 1 if worker.work().failed else 0


def _end_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _take_cores(number: int, jobs: int) -> None:
    """Restricts this process to its share of the cores; XLA makes as many threads as it may use."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[number::jobs] or [cores[number % len(cores)]]
    os.sched_setaffinity(0, mine)


def run_in_pool(folder: StudyFolder, arms: Sequence[str], *, jobs: int, command: Sequence[str]) -> int:
    """Runs `command` in `jobs` workers until none has work left; returns the exit status.

    The status is 1 if a run failed, 2 if a worker refused the command, 128 + N after signal N.
    """
    console = Console()
    pool = _Pool(folder.path / "workers", jobs, command)
    with received_signals() as received:
        try:
            pool.start()
            with Display(folder, arms, console) as display:
                while pool.alive() and not received:
                    display.show()
                    time.sleep(POLL_SECONDS)
                if received:
                    console.print(STOPPING)
        finally:
            pool.stop()
    if received:
        return 128 + received[0]
    if pool.refusal is not None:
        print(harmless(pool.refusal), file=sys.stderr)
        return 2
    return conclude_with_found(folder, arms, console)


@contextlib.contextmanager
def received_signals() -> Iterator[list[int]]:
    """Yields a list that SIGINT and SIGTERM are added to, instead of ending the process."""
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def conclude_with_found(folder: StudyFolder, arms: Sequence[str], console: Console) -> int:
    """Concludes with what the study's directory says of each run; returns the exit status."""
    from experiments.running.execute import Outcome
    from experiments.running.study_run import conclude

    outcome = Outcome()
    for member, standing in standings_of(folder, arms):
        if standing.state == "failed":
            outcome.failed[member.name] = standing.why
        elif standing.state != "done":
            outcome.waiting.append(member.name)
    return conclude(folder, outcome, console)


class _Pool:
    """The worker processes; each writes to a log of its own."""

    def __init__(self, logs: Path, jobs: int, command: Sequence[str]):
        self.refusal: str | None = None
        self._logs, self._command = logs, list(command)
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._deaths = dict.fromkeys(range(jobs), 0)

    def start(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        for number in self._deaths:
            self._start(number)

    def _start(self, number: int) -> None:
        with open(self._log(number), "ab") as log:
            self._workers[number] = subprocess.Popen(
                [sys.executable, "-m", "experiments.cli", *self._command, "--worker", str(number)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on once
            )

    def alive(self) -> bool:
        """Returns whether a worker is running; starts one that died again, and ends all if one refused the command."""
        for number, worker in list(self._workers.items()):
            status = worker.poll()
            if status is None:
                continue
            del self._workers[number]
            if status == 2:
                self.refusal = self._last_line(number)
                self.stop()
                return False
            if status not in (0, 1) and self._deaths[number] < MOST_DEATHS:
                self._deaths[number] += 1
                self._start(number)
        return bool(self._workers)

    def stop(self) -> None:
        """Asks all workers to save and end, and waits for them."""
        for worker in self._workers.values():
            worker.terminate()
        for worker in self._workers.values():
            worker.wait()
        self._workers.clear()

    def _log(self, number: int) -> Path:
        return self._logs / f"worker-{number}.log"

    def _last_line(self, number: int) -> str:
        lines = self._log(number).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"see {self._log(number)}")


class Display:
    """Shows a bar for the study and one for each run that is being trained; without a terminal, a line now and then."""

    def __init__(self, folder: StudyFolder, arms: Sequence[str], console: Console):
        self._folder, self._arms, self._console = folder, arms, console
        self._bars: Progress = rich_bars(console)
        self._whole = self._bars.add_task(marked_up(folder.study.name), total=None, detail="")
        self._tasks: dict[str, int] = {}
        self._began, self._flops_before = time.monotonic(), -1.0
        self._last_line = 0.0

    def __enter__(self) -> "Display":
        self._bars.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.__exit__(None, None, None)

    def show(self) -> None:
        standings = list(standings_of(self._folder, self._arms))
        done = sum(standing.loss is not None for _, standing in standings)
        running = [(member, standing) for member, standing in standings if standing.state == "running"]
        left = self._left(standings)
        self._bars.update(self._whole, total=len(standings), completed=done, detail=left)
        for member, standing in running:
            if member.name not in self._tasks:
                title = f"  {marked_up(member.name)}"
                self._tasks[member.name] = self._bars.add_task(title, total=member.run.steps, detail="")
            self._bars.update(self._tasks[member.name], completed=standing.step)  # type: ignore[arg-type]
        for name in self._tasks.keys() - {member.name for member, _ in running}:
            self._bars.remove_task(self._tasks.pop(name))  # type: ignore[arg-type]
        if not self._console.is_terminal and time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            steps = ", ".join(f"{m.name} at {s.step:,} of {m.run.steps:,}" for m, s in running)
            line = f"{done} of {len(standings)} runs are done; {steps or 'starting'}{'; ' + left if left else ''}"
            self._console.print(marked_up(line), soft_wrap=True)

    def _left(self, standings: Sequence[tuple[Member, Standing]]) -> str:
        """Returns the time left at the pace of this launch, by training FLOPs."""
        total = sum(m.run.steps * m.run.flops_per_step for m, _ in standings)
        spent = sum((m.run.steps if s.loss is not None else s.step) * m.run.flops_per_step for m, s in standings)
        if self._flops_before < 0:
            self._flops_before = spent
        gained, seconds = spent - self._flops_before, time.monotonic() - self._began
        if not gained or seconds < 10:
            return ""
        more = "" if self._folder.members().complete else ", then more runs follow"
        return f"about {duration((total - spent) * seconds / gained)} left{more}"


def standings_of(folder: StudyFolder, arms: Sequence[str]) -> Iterator[tuple[Member, Standing]]:
    """Yields the runs to work on that follow from the results so far, and how far each is."""
    for member in folder.wanted(arms):
        yield member, folder.standing(member)
