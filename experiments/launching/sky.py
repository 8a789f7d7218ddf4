"""A job as a task of SkyPilot (docs.skypilot.co, YAML specification), for `sky jobs launch`.

SkyPilot finds the capacity, mounts the bucket, runs the same commands on every host of the slice and, as the job is a
managed one, asks again after a preemption, and gives the slice back when the job has ended. The statuses that mean
"launch again" are answered so and not counted; other failures are tried again a few times.
"""

from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from common.files import write_atomically
from experiments.launching.job import AGAIN, BUNDLE, MAX_FAILURES, MOUNT, Job
from experiments.launching.slices import RENTED, accelerator_type

PROGRAMS = ("gcloud", "sky")
TASK = "sky.yaml"


def task(job: Job) -> dict[str, Any]:
    """Raises UserError for more than one slice, as SkyPilot asks for slices that do not know of each other, and for a
    longest life, which it has no word for.
    """
    if job.topology.slices > 1:
        raise UserError(
            f"--slices {job.topology.slices}: SkyPilot makes no Multislice; take --engine gcloud, or one slice"
        )
    if job.hours is not None:
        raise UserError(f"--hours {job.hours} is for --engine gcloud: SkyPilot's controller gives slices back itself")
    return {
        "name": job.run,
        "resources": {
            "infra": "gcp" if job.zone is None else f"gcp/*/{job.zone}",
            "accelerators": f"tpu-{accelerator_type(job.topology)}",
            "accelerator_args": {"runtime_version": RENTED[job.topology.chip].runtime, "tpu_vm": True},
            "use_spot": job.spot,
            "job_recovery": {
                "strategy": "FAILOVER",  # the same region first: the bucket is there
                "max_restarts_on_errors": MAX_FAILURES - 1,
                "recover_on_exit_codes": list(AGAIN),
            },
        },
        "file_mounts": {str(MOUNT): {"source": f"gs://{job.bucket.name}", "mode": "MOUNT"}},
        "envs": job.environment(),
        "setup": _script(job.setup()),
        "run": _script(job.main()),
    }


def write(job: Job, folder: Path) -> list[list[str]]:
    """Writes the task; returns the commands that submit it, where the bundle lies in `folder` too."""
    text = yaml.dump(task(job), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    write_atomically(folder / TASK, text.encode())
    return [
        ["gcloud", "storage", "cp", str(folder / BUNDLE), job.bundle_url],
        ["sky", "jobs", "launch", "--yes", "--name", job.run, str(folder / TASK)],
    ]


def afterwards(job: Job) -> dict[str, str]:
    """Commands for later, and what each is for."""
    return {"watch": f"sky jobs logs --name {job.run}", "stop": f"sky jobs cancel --name {job.run}"}


def _script(lines: list[str]) -> str:
    return "\n".join(["set -euo pipefail", *lines, ""])


class _Dumper(yaml.SafeDumper):
    """Scripts as they are read: line by line."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
