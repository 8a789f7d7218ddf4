"""A job as a task of SkyPilot (docs.skypilot.co, YAML specification), for `sky jobs launch`.

SkyPilot finds capacity, mounts the bucket and runs the same commands on every host of the slice. As the job is a
managed one, it requests a slice again after a preemption, and deletes it when the job has ended. Exit statuses in
`RELAUNCH` restart the job without being counted; other failures are retried a few times.
"""

from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import write_atomically
from experiments.launching.job import BUNDLE, MAX_FAILURES, MOUNT, RELAUNCH, Job
from experiments.launching.slices import RENTED, accelerator_type

PROGRAMS = ("gcloud", "sky")
TASK = "sky.yaml"


def task(job: Job) -> dict[str, Any]:
    """The task specification.

    Raises UserError for more than one slice, since SkyPilot would request slices that are not connected, and for a
    longest life, which it does not support.
    """
    if job.topology is not None and job.topology.slices > 1:
        raise UserError(
            f"--slices {job.topology.slices}: SkyPilot does not support Multislice; take --engine gcloud, or one slice"
        )
    if job.hours is not None:
        raise UserError(f"--hours {job.hours} is for --engine gcloud: SkyPilot's controller deletes slices itself")
    return {
        "name": job.run,
        "resources": {
            "infra": "gcp" if job.zone is None else f"gcp/*/{job.zone}",
            **_machine(job),
            "use_spot": job.spot,
            "job_recovery": {
                "strategy": "FAILOVER",  # the same region first: the bucket is there
                "max_restarts_on_errors": MAX_FAILURES - 1,
                "recover_on_exit_codes": list(RELAUNCH),
            },
        },
        "file_mounts": {str(MOUNT): {"source": f"gs://{job.bucket.name}", "mode": "MOUNT"}},
        "envs": job.environment(),
        "setup": _script(job.setup()),
        "run": _script(job.main()),
    }


def _machine(job: Job) -> dict[str, Any]:
    if job.topology is None:
        return {"cpus": f"{job.cpus}+"}
    return {
        "accelerators": f"tpu-{accelerator_type(job.topology)}",
        "accelerator_args": {"runtime_version": RENTED[job.topology.chip].runtime, "tpu_vm": True},
    }


def write(job: Job, folder: Path) -> list[list[str]]:
    """Writes the task; returns the commands that submit it, with the bundle in `folder` too."""
    return [upload(job, folder), write_task(job, folder / TASK)]


def upload(job: Job, folder: Path) -> list[str]:
    """Returns the command that uploads the code from `folder`."""
    return ["gcloud", "storage", "cp", str(folder / BUNDLE), job.bundle_url]


def write_task(job: Job, path: Path) -> list[str]:
    """Writes the task; returns the command that submits it once the code is uploaded."""
    text = yaml.dump(task(job), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    write_atomically(path, text.encode())
    return ["sky", "jobs", "launch", "--yes", "--name", job.run, str(path)]


def afterwards(job: Job) -> dict[str, str]:
    """Commands for later, by purpose."""
    return {"watch": f"sky jobs logs --name {job.run}", "stop": f"sky jobs cancel --name {job.run}"}


def _script(lines: list[str]) -> str:
    return "\n".join(["set -euo pipefail", *lines, ""])


class _Dumper(yaml.SafeDumper):
    """Writes scripts as block text, line by line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
