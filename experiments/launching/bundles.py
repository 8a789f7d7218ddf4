"""A study's missing runs as managed jobs of SkyPilot, a few runs each, that share the study's directory in a bucket.

    twinstack run ladder --on sky --topology v6e-4 --spot --bucket gs://my-bucket --bundle 8 train.mesh.fsdp=4
    twinstack run ladder --on sky --cpus 8 --spot --bucket gs://my-bucket --bundle 16 --go

Which runs are missing is read from the study's directory on this machine, a mount or a copy of the bucket's. Locks do
not work in a bucket: two jobs never train one run because each run is submitted once, and `sent.json` beside the jobs'
files remembers it.
"""

import dataclasses
import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from common.errors import UserError
from common.files import read_json, write_json
from experiments.launching import launch, sky
from experiments.launching.facts import facts
from experiments.launching.job import BUNDLE, Job, run_name
from experiments.launching.source import write_bundle
from experiments.members import Member
from experiments.running.study_folder import StudyFolder
from experiments.study import Study

SENT = "sent.json"
"""The runs of each submitted job, by its name."""


def submit_missing(
    job: Job, study: Study, results: StudyFolder, folder: Path, console: Console, *, bundle: int, go: bool
) -> int:
    """Writes a job for each `bundle` missing runs that can start, and submits them with `go`; returns the exit status.

    Args:
      job: what the jobs have in common; each gets a name and a selection of runs.
      study: with the selected arms only.
      results: the study's directory as this machine sees it.
      folder: where the jobs' files go.

    The status is 1 if a run has failed. Raises UserError as `launch` does.
    """
    launch.check_fit(study, job)
    ready, sent = can_be_sent(results, tuple(study.arms), folder)
    jobs = bundles(job, ready, bundle)
    commands = [sky.upload(job, folder)]
    for each in jobs:
        commands.append(sky.write_task(each, folder / f"{each.run}.yaml"))
        launch.say(console, each.run, each.overrides[-1].replace("run=", "", 1))
    if jobs:
        write_bundle(folder / BUNDLE)
        _describe(job, study, jobs, folder, console)
    if sent:
        advice = f"if their jobs ended without a result, remove {folder / SENT}"
        launch.say(console, "submitted before", f"{', '.join(sent)}; {advice}")
    if jobs and not go:
        prepare = ["twinstack", "data", "prepare", *job.configured, "--to", job.bucket.url("prepared")]
        launch.say(console, "tokens, once", shlex.join(prepare))
        for command in commands:
            launch.say(console, "then", shlex.join(command))
    elif jobs:
        _submit(commands, jobs, folder)
    return _conclude(job, study, results, console)


def can_be_sent(results: StudyFolder, arms: Sequence[str], folder: Path) -> tuple[list[Member], list[str]]:
    """Returns the missing runs that can start now, and the names of missing ones that were submitted before."""
    standings = [(member, results.standing(member)) for member in results.wanted(arms)]
    missing = [member for member, standing in standings if standing.loss is None and standing.state != "running"]
    before = {name for names in _read_sent(folder).values() for name in names}
    ready = [member for member in missing if member.name not in before and results.can_start(member)]
    return ready, [member.name for member in missing if member.name in before]


def bundles(job: Job, members: Sequence[Member], size: int) -> list[Job]:
    """Returns jobs of `size` runs each, in the order of `members`; equal runs give equal names."""
    return [_bundle(job, members[first : first + size]) for first in range(0, len(members), size)]


def _bundle(job: Job, members: Sequence[Member]) -> Job:
    names = ",".join(member.name for member in members)
    arms = ",".join(dict.fromkeys(member.arm for member in members))
    mark = hashlib.blake2b(names.encode(), digest_size=3).hexdigest()
    return dataclasses.replace(
        job,
        run=f"{run_name(f'{job.run}-{members[0].name}')[:33].strip('-')}-{mark}",
        overrides=(*job.overrides, f"arm={arms}", f"run={names}"),
        directory=job.run,
    )


def _describe(job: Job, study: Study, jobs: Sequence[Job], folder: Path, console: Console) -> None:
    where = f"{folder}: commit {job.commit[:12]}, jobs: {len(jobs)}, each on {launch.describe_slices(job)}"
    launch.say(console, "written", where)
    for purpose, text in facts(job, study, console).items():
        launch.say(console, f"{purpose} of a job" if purpose == "price" else purpose, text)


def _submit(commands: Sequence[list[str]], jobs: Sequence[Job], folder: Path) -> None:
    """Uploads the code, then submits one job after another and records each."""
    upload, *submissions = commands
    launch.submit([upload], sky.PROGRAMS)
    sent = _read_sent(folder)
    for job, command in zip(jobs, submissions, strict=True):
        launch.submit([command], sky.PROGRAMS)
        sent[job.run] = job.overrides[-1].removeprefix("run=").split(",")
        write_json(folder / SENT, sent)


def _read_sent(folder: Path) -> dict[str, list[str]]:
    path = folder / SENT
    if not path.exists():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what `twinstack run --on sky` writes: remove it")
    return {str(name): [str(run) for run in runs] for name, runs in found.items()}


def _conclude(job: Job, study: Study, results: StudyFolder, console: Console) -> int:
    """Prints how far the study is here and how to go on."""
    standings = [(member, results.standing(member)) for member in results.wanted(tuple(study.arms))]
    done = sum(standing.loss is not None for _, standing in standings)
    more = "" if results.members().complete else ", and more follow from these"
    launch.say(console, "done here", f"{done} of {len(standings)} runs{more}")
    copy = ["gcloud", "storage", "rsync", "--recursive", "--exclude=.*/checkpoints/.*"]
    copy += [job.bucket.url("runs", job.run), str(results.path)]
    launch.say(console, "watch", "sky jobs queue")
    launch.say(console, "results", f"{shlex.join(copy)}; then the same command submits what follows")
    failed = {member.name: standing.why for member, standing in standings if standing.state == "failed"}
    for name, why in failed.items():
        launch.say(console, f"{name} FAILED", why)
    return 1 if failed else 0
