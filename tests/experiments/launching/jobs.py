"""Jobs to launch, and stand-ins for the programs of a host."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

from experiments.launching.job import Bucket, Job
from experiments.launching.slices import rentable

HOSTILE = "data.source.name=tsv:/a b'\"$(touch pwned)`touch pwned`;touch pwned\n>pwned \\"
JOB = Job(
    run="first-light",
    study="first_light",
    overrides=("train.mesh.fsdp=32", HOSTILE, "arm=gpt"),
    commit="0123456789abcdef0123456789abcdef01234567",
    topology=rentable("v5p-64", 1),
    bucket=Bucket.of("gs://my-bucket/me"),
    zone="us-east5-a",
    spot=True,
)
JOBS = {
    "spot": JOB,
    "anywhere": dataclasses.replace(
        JOB, zone=None, spot=False, overrides=JOB.overrides[:-1], topology=rentable("v6e:4x4", 1)
    ),
    "one-chip": dataclasses.replace(JOB, topology=rentable("v5litepod-1", 1), bucket=Bucket.of("gs://my-bucket")),
}
TWO_SLICES = dataclasses.replace(JOB, topology=rentable("v5p-64", 2))

COMMAND = ["run", "first_light", *JOB.overrides, "--run-dir", "/mnt/twinstack/me/runs/first-light"]


def git(root: Path, *arguments: str) -> str:
    """Runs git in `root` and returns what it prints."""
    run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def program(folder: Path, name: str, body: str) -> None:
    """Writes a bash script that stands in for the program `name`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}")
    (folder / name).chmod(0o755)
