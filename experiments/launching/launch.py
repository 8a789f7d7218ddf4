"""`twinstack launch`: writes what an engine needs to run a job and, with `--go`, submits it.

    twinstack launch first_light --topology v5p-64 --spot --bucket gs://my-bucket train.mesh.fsdp=32 data.rows=32
    twinstack launch first_light --topology v6e:2x4 --engine gcloud --bucket gs://my-bucket/me train.mesh.fsdp=8 --go

Account and project are `gcloud`'s settings and are not written to files; values of --env are.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console

from common.errors import UserError
from common.sharding.shape import MeshShape
from common.terminal import marked_up
from common.train.programs import check_rows
from experiments.launching import gcloud, sky
from experiments.launching.facts import facts
from experiments.launching.job import BUNDLE, Job
from experiments.launching.slices import accelerator_type
from experiments.launching.source import write_bundle
from experiments.running.pipeline import make_setup
from experiments.study import Study

ENGINES: dict[str, ModuleType] = {"sky": sky, "gcloud": gcloud}


def launch(job: Job, study: Study, engine: str, folder: Path, console: Console, *, go: bool) -> None:
    """Writes the job's files and code into `folder`, prints facts and next steps and, with `go`, submits the job.

    Raises UserError if the mesh does not match the slices, rows do not divide over it, or the engine does not support
    the job; with `go` also if a program is not installed or fails.
    """
    check_fit(study, job)
    commands = ENGINES[engine].write(job, folder)
    write_bundle(folder / BUNDLE)
    say(console, "written", f"{folder}: commit {job.commit[:12]} on {describe_slices(job)}")
    for purpose, text in facts(job, study, console).items():
        say(console, purpose, text)
    if engine == "gcloud":
        say(console, "longest life", f"{gcloud.hours(job)} hours (--hours)")
    for remark in study.remarks():
        say(console, "warning", remark)
    if not go:
        prepare = ["twinstack", "data", "prepare", *job.configured, "--to", job.bucket.url("prepared")]
        say(console, "tokens, once", shlex.join(prepare))
        for command in commands:
            say(console, "then", shlex.join(command))
    for purpose, text in ENGINES[engine].afterwards(job).items():
        say(console, purpose, text)
    if go:
        submit(commands, ENGINES[engine].PROGRAMS)


def check_fit(study: Study, job: Job) -> None:
    """Raises UserError where the mesh of an arm does not match the job's slices, or rows do not divide over it."""
    for run in study.arms.values():
        check_mesh(run.train.mesh, job)
        check_rows(make_setup(run))


def check_mesh(mesh: MeshShape, job: Job) -> None:
    """Raises UserError if the mesh needs more or fewer devices than there are, or its replicas are not the slices."""
    if job.topology is None:
        if mesh.devices > 1:
            raise UserError(f"train.mesh {mesh} does not match {describe_slices(job)}: each run has one core")
        return
    slices, devices = job.topology.slices, job.topology.devices
    fits = MeshShape(replica=slices, fsdp=devices // slices)
    if mesh.devices != devices or (slices > 1 and mesh.replica != slices):
        raise UserError(
            f"train.mesh {mesh} does not match {describe_slices(job)}; "
            f"nearest: {' '.join(f'train.mesh.{part}' for part in str(fits).split(','))}"
        )


def describe_slices(job: Job) -> str:
    if job.topology is None:
        return f"a machine of {job.cpus} cores"
    topology = job.topology
    return f"{topology.slices} x {accelerator_type(topology)} ({topology}: {topology.chips} chips)"


def submit(commands: list[list[str]], programs: Sequence[str]) -> None:
    """Runs commands in order; raises UserError for a program that is not installed, or for the first that fails."""
    for program in programs:
        if shutil.which(program) is None:
            raise UserError(f"--go needs the program {program!r}, which is not installed; without --go nothing is run")
    for command in commands:
        status = subprocess.run(command).returncode
        if status:
            raise UserError(f"{shlex.join(command)} failed with status {status}")


def say(console: Console, purpose: str, text: str) -> None:
    """Prints a line of what was written, or of what to do next."""
    console.print(f"[bold]{marked_up(purpose)}[/bold]: {marked_up(text)}", soft_wrap=True, highlight=False)
