"""Trains and scores what is missing of a study, one run after another in this process.

Several workers may do this in one study's directory at once: a lock decides which of them works on a run.
"""

import contextlib
import dataclasses
import math
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from common.config import to_json
from common.errors import UserError
from common.progress import ProgressBars
from common.report.units import duration
from common.sharding.hosts import is_first, on_first_process
from common.terminal import marked_up
from common.train import run_dir as rd
from common.train.anomalies import Diverged
from common.train.config import InitFrom
from common.train.loop import fit
from common.train.run import SHARED_STORAGE_SECONDS
from common.train.run_files import RunFiles
from common.train.stored import has_checkpoint
from experiments.members import Member
from experiments.models.initial import check_initial, check_tokenizer, initial_content
from experiments.run import complete_run
from experiments.running.console import training_bar
from experiments.running.pipeline import check_devices, make_task, open_data
from experiments.running.scored_splits import open_tests
from experiments.running.scoring import OpenRun, finished_result, score_run
from experiments.running.study_folder import StudyFolder, working_on

POLL_SECONDS = 2.0
"""How often a worker looks whether the runs that it waits for are finished."""


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What a worker has done."""

    trained: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    """Why each failed run failed."""
    waiting: list[str] = dataclasses.field(default_factory=list)
    """Runs that another process is training, or that start from a run that failed."""


class StudyWorker:
    """Works on the runs of one study."""

    def __init__(
        self,
        folder: StudyFolder,
        console: Console,
        *,
        arms: Sequence[str],
        profile_steps: int = 0,
        patient: bool = False,
        verifies: bool = True,
    ):
        """
        Args:
          arms: those to train; the study's others are left alone.
          patient: whether to wait for runs that other workers are training, since others may follow from them.
          verifies: whether to hold runs that are done already against today's data.
        """
        self._folder, self._console, self._arms = folder, console, frozenset(arms)
        self._profile_steps, self._patient = profile_steps, patient
        self._to_verify = self._names_done() if verifies else set()
        self._done: set[str] = set()
        self._said: set[str] = set()
        self._seconds, self._flops_done = 0.0, 0
        self._outcome = Outcome()

    def check(self) -> None:
        """Raises UserError for everything that can be known to be wrong before anything is trained.

        Opens the data and the scored splits of every arm. Prints what the user should know.
        """
        study = self._folder.study
        arms = {name: arm for name, arm in study.arms.items() if name in self._arms}
        for name, arm in arms.items():
            arm.check(name)
            check_devices(arm)
            self._say(*check_initial(name, arm, self._least_trained(name)))
        on_first_process(self._check_directories)
        self._say(*(f"warning: {remark}" for remark in study.remarks()))
        for name, arm in arms.items():
            data = open_data(name, arm)
            self._say(*check_tokenizer(name, arm, data.tokenizer, self._least_trained(name)))
            self._say(*(test.in_training.sentence(split) for split, test in open_tests(arm, data.tokenizer).items()))

    def work(self) -> Outcome:
        """Trains and scores runs until none is left that this process can work on."""
        while (name := on_first_process(self._next)) is not None:
            if name:
                self._attempt(self._await(name))
            else:
                time.sleep(POLL_SECONDS)
        self._outcome.waiting = on_first_process(self._left)
        return self._outcome

    def work_on(self, name: str) -> None:
        """Trains and scores one run, unless another worker has it.

        Raises UserError if there is no run of this name, or it starts from one that is not done.
        """
        member = self._folder.member(name)
        if member is None or not self._folder.can_start(member):
            raise UserError(f"run {name!r} does not follow from the results in {self._folder.path}")
        self._attempt(member)

    def _await(self, name: str) -> Member:
        """Returns the run of this name, once this process sees the results that it follows from."""
        give_up = time.monotonic() + SHARED_STORAGE_SECONDS
        while (member := self._folder.member(name)) is None:
            if time.monotonic() > give_up:
                raise UserError(f"process {jax.process_index()} does not see the results in {self._folder.path}")
            time.sleep(POLL_SECONDS)
        return member

    def _least_trained(self, arm: str) -> Path | None:
        """Returns the directory of a run of the arm, if possible of one without a checkpoint; None without runs."""
        folders = [self._folder.run_dir(m) for m in self._folder.members().members if m.arm == arm]
        return min(folders, key=lambda folder: has_checkpoint(folder / RunFiles.CHECKPOINTS), default=None)

    def _next(self) -> str | None:
        """Returns the name of a run to work on, "" if there is only something to wait for, None if there is nothing."""
        members = self._folder.members()
        self._folder.write_list(members)
        waiting = False
        for member in self._folder.wanted(self._arms):
            if member.name in self._done or member.name in self._outcome.failed:
                continue
            standing = self._folder.standing(member)
            if standing.state == "running":
                waiting = True
            elif standing.state == "done" and member.name not in self._to_verify:
                self._done.add(member.name)
            elif standing.loss == math.inf:
                self._outcome.failed[member.name] = standing.why
            elif self._folder.can_start(member):
                return member.name
        return "" if waiting and self._patient else None

    def _names_done(self) -> set[str]:
        members = self._folder.members().members
        return {member.name for member in members if self._folder.standing(member).state == "done"}

    def _left(self) -> list[str]:
        """Returns the runs to work on that neither are done nor have failed."""
        mine = self._folder.wanted(self._arms)
        open_ = [member.name for member in mine if self._folder.standing(member).loss is None]
        return [name for name in open_ if name not in self._outcome.failed]

    def _attempt(self, member: Member) -> None:
        """Trains and scores a run; records a failure, so that the study goes on with the others."""
        folder = self._folder.run_dir(member)
        with working_on(folder) if is_first() else contextlib.nullcontext(True) as mine:
            if not on_first_process(lambda: mine):
                return
            try:
                self._train_and_score(member)
            except Exception as error:
                if jax.process_count() > 1:  # the other processes may not have failed
                    raise
                why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                self._folder.note_failure(member, why, diverged=isinstance(error, Diverged))
                self._outcome.failed[member.name] = why
                self._console.print(marked_up(f"{member.name}: FAILED: {why}"), soft_wrap=True)
                if not isinstance(error, UserError):
                    self._console.print(marked_up(traceback.format_exc()), soft_wrap=True)
                return
            on_first_process(lambda: self._folder.forget_failure(member))
        self._done.add(member.name)

    def _train_and_score(self, member: Member) -> None:
        name, run, folder = member.name, member.run, self._folder.run_dir(member)
        on_first_process(lambda: initial_content(run.init, folder))
        data = open_data(name, run)
        opened = OpenRun(name=name, run=run, folder=folder, data=data, tests=open_tests(run, data.tokenizer))
        if (result := finished_result(opened)) is not None:
            self._say(f"{name}: trained and scored already, step {result.steps}")
            on_first_process(lambda: rd.refresh(folder, run.about, complete_run))
            return
        if on_first_process(lambda: folder == self._folder.path / name and self._folder.adopt(member)):
            self._say(f"{name}: trained in a neighbouring study, scored here")
        init, content = self._start(member), on_first_process(lambda: initial_content(run.init, folder))
        started = dataclasses.replace(run, init=init, after=None)
        self._announce(member)
        self._say(*check_initial(name, started, folder), *check_tokenizer(name, started, data.tokenizer, folder))
        began, progress = time.monotonic(), ProgressBars(self._console)
        progress.say(f"{name}: compiling")
        with training_bar(self._console, name) as bar:
            task = make_task(run, data, init, initial_content=content, profile_steps=self._profile_steps)
            fitted = fit(task, folder, bar)
        score_run(opened, fitted, progress)
        self._seconds += time.monotonic() - began
        self._flops_done += run.steps * run.flops_per_step
        self._outcome.trained.append(name)

    def _announce(self, member: Member) -> None:
        """Prints which of how many runs begins and, once one has been trained, the time left for the whole study."""
        members = self._folder.members()
        left = [m for m in self._folder.wanted(self._arms) if self._folder.standing(m).loss is None]
        if len(members.members) < 3:
            return
        time_left = ""
        if self._flops_done:
            seconds = sum(m.run.steps * m.run.flops_per_step for m in left) * self._seconds / self._flops_done
            time_left = f"; about {duration(seconds)} left{'' if members.complete else ', and more runs will follow'}"
        self._say(f"{member.name}: {len(left)} of {len(members.members)} runs are missing{time_left}")

    def _start(self, member: Member) -> InitFrom | None:
        """Returns the model on disk that the run starts from; None if it starts fresh."""
        after = member.run.after
        if after is None:
            return member.run.init
        before = self._folder.member(after.run)
        assert before is not None
        return InitFrom(path=str(self._folder.run_dir(before)), rules=after.rules)

    def _check_directories(self) -> None:
        """Raises UserError where the directory of a run holds another run, which would be lost.

        It is another one too if the weights that it started from have been replaced.
        """
        for member in self._folder.members().members:
            run_dir = self._folder.path / member.name
            if not rd.has_begun(run_dir):
                continue
            before = rd.stored_config(run_dir, complete_run)
            if changes := rd.identity_changes(before, to_json(member.run)):
                raise UserError(
                    f"{run_dir} holds another config of {member.name} ({'; '.join(map(str, changes))}): "
                    "choose another --run-dir, or remove it"
                )
            initial_content(member.run.init, run_dir)

    def _say(self, *lines: str) -> None:
        """Prints each line once, in the first process."""
        for line in lines:
            if line not in self._said and is_first():
                self._console.print(marked_up(line), soft_wrap=True)
            self._said.add(line)
