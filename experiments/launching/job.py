"""A job: a twinstack command at one commit, run on TPU slices, with everything that must outlive them in a bucket.

The bucket holds `source/COMMIT.bundle` (the code), `prepared/` (tokens), `data/` ($TWINSTACK_SHARED_DATA), `xla/`
(compiled programs) and `runs/RUN/` (the run directory); with the gcloud engine also `ended/RUN` (the run's exit status)
and `logs/RUN/HOST.log`.

Hosts reach tokens and compiled programs by url. A run directory must be a folder, so gcsfuse mounts the bucket, and
hosts clone the code from there too: a git bundle needs no other account and contains exactly the commit.
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from common.compute.topology import Topology
from common.errors import UserError
from common.train import preemption, watchdog

MOUNT = PurePosixPath("/mnt/twinstack")
LOCAL = PurePosixPath("/tmp/twinstack")
"""On each host's local disk."""
BUNDLE = "source.bundle"
"""File name of the code, in the folder that `launch` writes."""
MAX_FAILURES = 3
"""Failures in a row after which a run is given up. A preemption is not a failure, and a new checkpoint resets the
count."""
USER_ERROR = 2
"""Exit status of a user's mistake; running again would not help."""
RELAUNCH = (watchdog.STALLED, preemption.STATUS)
"""Exit statuses that ask for another launch."""
PYTHON = "3.12"
"""The version that uv installs on hosts; the Python of Cloud TPU's images is too old."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """A bucket of Cloud Storage, or a folder in one.

    >>> bucket = Bucket.of("gs://lab/me/")
    >>> bucket.url("xla"), str(bucket.mounted("runs", "first"))
    ('gs://lab/me/xla', '/mnt/twinstack/me/runs/first')
    """

    name: str
    folder: str = ""

    @classmethod
    def of(cls, url: str) -> "Bucket":
        """Parses `gs://BUCKET[/FOLDER]`; raises UserError for anything else."""
        found = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])((?:/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*)/?", url)
        if found is None:
            raise UserError(f"--bucket {url!r} must be gs://BUCKET or gs://BUCKET/FOLDER, such as gs://my-bucket/me")
        return cls(name=found[1], folder=found[2].removeprefix("/"))

    def url(self, *parts: str) -> str:
        """The url of a path in the bucket."""
        return f"gs://{PurePosixPath(self.name, self.folder, *parts)}"

    def mounted(self, *parts: str) -> PurePosixPath:
        """The path on a host, where the bucket is mounted."""
        return MOUNT.joinpath(self.folder, *parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One launch. Raises UserError for a study that hosts lack, and a name or a zone that the engines would refuse."""

    run: str
    """Name of the launch, and of its resources at the engine."""
    study: str
    """Name of a study that is part of the commit, or of a package that hosts install."""
    overrides: tuple[str, ...]
    """Fields, and labels that select arms."""
    commit: str
    topology: Topology | None
    """The TPU slices; None: machines with `cpus` cores."""
    bucket: Bucket
    zone: str | None
    """None: the engine chooses, or its settings do."""
    spot: bool
    variables: tuple[tuple[str, str], ...] = ()
    """Environment variables for every host's process; they override those of `environment`."""
    hours: int | None = None
    """Longest life of the slices, counted from boot; None: the engine's default."""
    cpus: int | None = None
    """Cores of a machine without accelerators, which trains as many runs at a time."""
    directory: str | None = None
    """Name of the study's directory in the bucket's `runs/`, which jobs may share; None: the launch's name."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.run):
            raise UserError(
                f"--run {self.run!r} must be lower-case letters, digits and hyphens, 40 at most, a letter first; "
                f"nearest: {run_name(self.run)}"
            )
        if self.study.endswith(".py"):
            raise UserError(
                f"{self.study} is a file of this machine, and hosts run a study of the commit: move it into "
                "experiments/, name it in experiments/find.py and commit both"
            )
        if self.zone is not None and not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone):
            raise UserError(f"--zone {self.zone!r} must be a zone of Google Cloud, such as us-east5-a")

    @property
    def slices(self) -> Topology:
        """The TPU slices of a job that has them."""
        assert self.topology is not None
        return self.topology

    @property
    def configured(self) -> list[str]:
        """The arguments that name the study and its overrides in any twinstack command."""
        return [self.study, *self.overrides]

    @property
    def bundle_url(self) -> str:
        """Where the code is uploaded to."""
        return self.bucket.url("source", f"{self.commit}.bundle")

    def environment(self) -> dict[str, str]:
        """Environment variables of every host's process."""
        return {
            "TWINSTACK_CACHE": str(LOCAL / "cache"),
            "TWINSTACK_PREPARED": self.bucket.url("prepared"),
            "TWINSTACK_SHARED_DATA": str(self.bucket.mounted("data")),
            "JAX_COMPILATION_CACHE_DIR": self.bucket.url("xla"),
            "PYTHONUNBUFFERED": "1",
            **dict(self.variables),
        }

    def setup(self) -> list[str]:
        """Lines of bash that install the commit on a host with the bucket mounted; running them again is safe."""
        extras = "gcs" if self.topology is None else "tpu,gcs"
        source = LOCAL / "source"
        bundle = self.bucket.mounted("source", f"{self.commit}.bundle")
        return [
            f"rm -rf {source}",
            shlex.join(["git", "clone", "--quiet", str(bundle), str(source)]),
            f"cd {source}",
            f"git checkout --quiet --detach {self.commit}",
            "python3 -m pip install --quiet uv",
            f"python3 -m uv venv --quiet --python {PYTHON} .venv",
            f"python3 -m uv pip install --quiet --python .venv --constraint constraints.txt --editable '.[{extras}]'",
        ]

    def main(self) -> list[str]:
        """Lines of bash that start or resume the command on one host, and exit with its status.

        After a failure that left new checkpoints the status is one of `RELAUNCH`, so that engines do not count it.
        """
        command = ["run", *self.configured, *([] if self.cpus is None else ["--jobs", str(self.cpus)])]
        run_dir = self.bucket.mounted("runs", self.directory or self.run)
        final = " | ".join(map(str, (0, USER_ERROR, *RELAUNCH)))
        find = f"find {run_dir} -mindepth 3 -maxdepth 3 -regex '.*/checkpoints/[0-9]+' 2>/dev/null"
        return [
            f"cd {LOCAL / 'source'}",
            f"saved() {{ {{ {find} || true; }} | sort; }}",
            "before=$(saved)",
            f"{shlex.join(['.venv/bin/twinstack', *command, '--run-dir', str(run_dir)])} &",
            "run=$!",
            "trap 'kill -TERM $run 2>/dev/null || true' TERM",
            "status=0",
            "wait $run || status=$?",
            "while kill -0 $run 2>/dev/null; do status=0; wait $run || status=$?; done # a signal ends a wait",
            f'case $status in {final}) ;; *) [ "$(saved)" = "$before" ] || status={watchdog.STALLED} ;; esac',
            "exit $status",
        ]


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def variables(given: Sequence[str], here: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Parses `NAME=VALUE`, or `NAME` with its value taken from `here`; the last of several with one name counts.

    >>> variables(["A=1=2", "B"], {"B": "here"})
    (('A', '1=2'), ('B', 'here'))

    Raises UserError for an invalid name, for a value of several lines, and for a variable that `here` lacks.
    """
    found = {}
    for text in given:
        name, stated, value = text.partition("=")
        if not _NAME.fullmatch(name):
            raise UserError(f"--env {text!r} must be NAME=VALUE or NAME, such as TFDS_DATA_DIR=gs://my-bucket/tfds")
        if not stated and name not in here:
            raise UserError(f"--env {name}: it is not set here; give --env {name}=VALUE")
        found[name] = value if stated else here[name]
        if "\n" in found[name] or "\0" in found[name]:
            raise UserError(f"--env {name}: its value holds a line break or a NUL character")
    return tuple(found.items())


def run_name(text: str) -> str:
    """The valid run name closest to `text`.

    >>> run_name("first_light"), run_name("2 Dogs!")
    ('first-light', 'run-2-dogs')
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:40].strip("-")
