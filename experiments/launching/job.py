"""What is launched: a command of ours at one commit on TPU slices, with everything that must outlive them in a bucket.

In the bucket: `source/COMMIT.bundle` (the code), `prepared/` (tokens), `data/` ($TWINSTACK_SHARED_DATA), `xla/`
(compiled programs), `runs/RUN/` (the run directory) and, of gcloud's, `ended/RUN` (the status that the run ended with)
and `logs/RUN/HOST.log`.

Tokens and compiled programs are reached by url. A run directory must be a folder, so the bucket is mounted by gcsfuse,
and hosts take the code from there too: a bundle needs no account anywhere else, and clones as the very commit.
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
"""On each host's own disk."""
BUNDLE = "source.bundle"
"""The code, in the folder of what is written here."""
MAX_FAILURES = 3
"""How often in a row a run may fail; a preemption is no failure, and a run that saved something resets the count."""
USER_ERROR = 2
"""Status of a mistake that trying again does not mend."""
AGAIN = (watchdog.STALLED, preemption.STATUS)
"""Statuses that mean: launch again."""
PYTHON = "3.12"
"""Cloud TPU's images bring one that is too old; uv fetches this one."""


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
        """Raises UserError where `url` is no `gs://BUCKET[/FOLDER]`."""
        found = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])((?:/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*)/?", url)
        if found is None:
            raise UserError(f"--bucket {url!r} must be gs://BUCKET or gs://BUCKET/FOLDER, such as gs://my-bucket/me")
        return cls(name=found[1], folder=found[2].removeprefix("/"))

    def url(self, *parts: str) -> str:
        return f"gs://{PurePosixPath(self.name, self.folder, *parts)}"

    def mounted(self, *parts: str) -> PurePosixPath:
        """Where a host finds it."""
        return MOUNT.joinpath(self.folder, *parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    run: str
    """Name of the run, and of what the engine makes for it."""
    experiment: str
    overrides: tuple[str, ...]
    arm: str | None
    """None: all arms, one after the other."""
    commit: str
    topology: Topology
    bucket: Bucket
    zone: str | None
    """None: the engine's own choice or setting."""
    spot: bool
    variables: tuple[tuple[str, str], ...] = ()
    """Further environment variables of every host's process, or other values of ours."""
    hours: int | None = None
    """How long the slices may last, from their boot; None: the engine's own choice."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.run):
            raise UserError(
                f"--run {self.run!r} must be lower-case letters, digits and hyphens, 40 at most, a letter first; "
                f"nearest: {run_name(self.run)}"
            )
        if self.zone is not None and not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z]", self.zone):
            raise UserError(f"--zone {self.zone!r} must be a zone of Google Cloud, such as us-east5-a")

    @property
    def configured(self) -> list[str]:
        """How a command is told of the experiment."""
        return [self.experiment, *self.overrides]

    @property
    def bundle_url(self) -> str:
        return self.bucket.url("source", f"{self.commit}.bundle")

    def environment(self) -> dict[str, str]:
        """What every host's process is told."""
        return {
            "TWINSTACK_CACHE": str(LOCAL / "cache"),
            "TWINSTACK_PREPARED": self.bucket.url("prepared"),
            "TWINSTACK_SHARED_DATA": str(self.bucket.mounted("data")),
            "JAX_COMPILATION_CACHE_DIR": self.bucket.url("xla"),
            "PYTHONUNBUFFERED": "1",
            **dict(self.variables),
        }

    def setup(self) -> list[str]:
        """Lines of bash that install the commit on a host where the bucket is mounted; they may run again."""
        source = LOCAL / "source"
        bundle = self.bucket.mounted("source", f"{self.commit}.bundle")
        return [
            f"rm -rf {source}",
            shlex.join(["git", "clone", "--quiet", str(bundle), str(source)]),
            f"cd {source}",
            f"git checkout --quiet --detach {self.commit}",
            "python3 -m pip install --quiet uv",
            f"python3 -m uv venv --quiet --python {PYTHON} .venv",
            "python3 -m uv pip install --quiet --python .venv --constraint constraints.txt --editable '.[tpu,gcs]'",
        ]

    def main(self) -> list[str]:
        """Lines of bash that run or go on with the command on one host, and end with its status.

        A failure after new checkpoints ends as what is to be launched again, so that engines do not count it.
        """
        command = ["compare", *self.configured] if self.arm is None else ["train", *self.configured, "--arm", self.arm]
        run_dir = self.bucket.mounted("runs", self.run)
        told = " | ".join(map(str, (0, USER_ERROR, *AGAIN)))
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
            f'case $status in {told}) ;; *) [ "$(saved)" = "$before" ] || status={watchdog.STALLED} ;; esac',
            "exit $status",
        ]


_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def variables(given: Sequence[str], here: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Variables from `NAME=VALUE`, or from `NAME` with its value in `here`; of several with one name, the last counts.

    >>> variables(["A=1=2", "B"], {"B": "here"})
    (('A', '1=2'), ('B', 'here'))

    Raises UserError for what is no name, for a value of several lines and for a variable that is not set here.
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
    """The nearest name that a run may have.

    >>> run_name("first_light"), run_name("2 Dogs!")
    ('first-light', 'run-2-dogs')
    """
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return (name if name[:1].isalpha() else f"run-{name}")[:40].strip("-")
