"""Whether hosts can read what an experiment reads: they have the code, the bucket, and nothing of this machine."""

import re
from collections.abc import Iterator, Sequence

from common.data.sources.by_name import BUILT_IN
from common.data.sources.config import SourceConfig, parts_of
from common.errors import UserError
from experiments.config import Experiment
from experiments.launching.job import MOUNT, Job

TFDS_FOLDER = "TFDS_DATA_DIR"
_ELSEWHERE = ("tfds", "corpus")
"""Schemes of sources that are no files."""


def check_readable(experiment: Experiment, arms: Sequence[str], job: Job) -> None:
    """Raises UserError for the first path of this machine that hosts would be sent to, and for an unnamed TFDS folder.

    Paths in the mounted bucket are theirs.
    """
    for name, value in job.variables:
        if value.startswith(("/", "~", ".")) and not _on_hosts(value) and name == TFDS_FOLDER:
            raise UserError(f"--env {name}={value} is a folder of this machine; {_advice(job, 'tfds')}")
    for where, path in _paths(experiment, arms):
        if not _on_hosts(path):
            raise UserError(f"{where} {path} is on this machine, where hosts cannot read it; {_advice(job, 'files')}")
    for part in parts_of(experiment.data.source):
        _check_source(part, job)


def _check_source(part: SourceConfig, job: Job) -> None:
    scheme, _, rest = part.name.partition(":")
    if scheme == "tfds" and rest.partition(":")[0].partition("/")[0] not in BUILT_IN:
        if not job.environment().get(TFDS_FOLDER):
            raise UserError(
                f"data.source.name={part.name}: hosts find it in ${TFDS_FOLDER}, which nothing names; add --env "
                f"{TFDS_FOLDER}={job.bucket.url('tfds')}, or the url where it is prepared"
            )
    elif scheme not in _ELSEWHERE and not _on_hosts(rest):
        raise UserError(
            f"data.source.name={part.name} is on this machine, where hosts cannot read it; copy the files to "
            f"{job.bucket.url('data')} (gcloud storage cp) and give {scheme}:{job.bucket.url('data')}/..."
        )


def _paths(experiment: Experiment, arms: Sequence[str]) -> Iterator[tuple[str, str]]:
    if (path := experiment.data.tokenizer.path) is not None:
        yield "data.tokenizer.path", path
    for name in arms:
        if (init := experiment.arms[name].init) is not None:
            yield f"arms.{name}.init.path", init.path


def _on_hosts(path: str) -> bool:
    return bool(re.match(r"[a-z0-9]+://", path)) or path.startswith(f"{MOUNT}/")


def _advice(job: Job, folder: str) -> str:
    return f"copy it to {job.bucket.url(folder)} (gcloud storage cp -r) and name it {job.bucket.mounted(folder)}/..."
