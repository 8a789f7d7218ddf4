"""Checks that hosts can read what a study reads: they reach the code and the bucket, not this machine."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Sequence

from common.data.config import DataConfig
from common.data.objectives.config import mode_names
from common.data.sources.by_name import BUILT_IN, TFDS_FOLDER
from common.data.sources.config import SourceConfig, parts_of
from common.data.tokenized.origins import has_tokenizer, kept_source
from common.data.tokenized.prepared import VARIABLE
from common.errors import UserError
from experiments.launching.job import MOUNT, Job
from experiments.study import Study

_SCHEMES_WITHOUT_PATH = ("tfds", "corpus")
"""Schemes of sources that are named, not given as a path."""


def check_readable(study: Study, job: Job) -> None:
    """Raises UserError for the first path that hosts cannot read, or if hosts would not find TFDS's folder.

    Hosts can read urls and paths in the mounted bucket. Sources and tokenizers that are prepared in the bucket need no
    files.
    """
    for name, run in study.arms.items():
        if run.init is not None and not _on_hosts(run.init.path):
            raise UserError(
                f"arms.{name}.init.path {run.init.path} is on this machine, where hosts cannot read it; {_advice(job)}"
            )
    read: list[tuple[DataConfig, tuple[str, ...]]] = []
    for run in study.arms.values():
        data = dataclasses.replace(run.data, seed=0)
        if (data, run.evaluation.splits) not in read:  # arms usually read the same
            read.append((data, run.evaluation.splits))
            _check_data(data, run.evaluation.splits, job)


def _check_data(data: DataConfig, scored: Sequence[str], job: Job) -> None:
    tokenizer, modes = data.tokenizer, mode_names(data.objective)
    if tokenizer.path is not None and not _on_hosts(tokenizer.path):
        lacking = _why_unprepared(job, lambda where: has_tokenizer(tokenizer, modes, where))
        if lacking:
            raise UserError(
                f"data.tokenizer.path {tokenizer.path} is on this machine, where hosts cannot read it, and {lacking}: "
                f"{_prepare(job)}; or {_advice(job)}"
            )
    for part in (part for arm in data.arms() for part in parts_of(arm.source)):
        splits = dict.fromkeys((part.train_split, part.validation_split, *scored))
        _check_source(part, list(splits), job)


def _check_source(part: SourceConfig, splits: Sequence[str], job: Job) -> None:
    scheme, _, rest = part.name.partition(":")
    tfds_folder = job.environment().get(TFDS_FOLDER, "")
    hosts_have_it = scheme == "corpus" or rest.partition(":")[0].partition("/")[0] in BUILT_IN
    if hosts_have_it if scheme in _SCHEMES_WITHOUT_PATH else _on_hosts(rest):
        return
    if scheme == "tfds" and _on_hosts(tfds_folder):
        return
    lacking = _why_unprepared(job, lambda where: all(kept_source(part, split, where) is not None for split in splits))
    if not lacking:
        return
    if scheme == "tfds":
        what = f"is a folder of this machine ({tfds_folder})" if tfds_folder else "is not set"
        raise UserError(
            f"data.source.name={part.name}: hosts look for it in ${TFDS_FOLDER}, which {what}, and {lacking}: add "
            f"--env {TFDS_FOLDER}={job.bucket.url('tfds')}, or another url; or {_prepare(job)}"
        )
    raise UserError(
        f"data.source.name={part.name} is on this machine, where hosts cannot read it, and {lacking}: {_prepare(job)}; "
        f"or copy the files and give {scheme}:{job.bucket.url('data')}/..."
    )


def _why_unprepared(job: Job, is_prepared: Callable[[str], bool]) -> str:
    """Why hosts cannot use prepared tokens instead; empty if they can."""
    where = job.environment()[VARIABLE]
    try:
        return "" if is_prepared(where) else f"{where} has nothing prepared from it"
    except UserError as error:
        return f"it is unknown whether it is prepared ({error})"


def _on_hosts(path: str) -> bool:
    """Whether hosts can read `path`: a url, or a path in the mounted bucket."""
    return bool(re.match(r"[a-z0-9]+://", path)) or path.startswith(f"{MOUNT}/")


def _prepare(job: Job) -> str:
    command = ["twinstack", "data", "prepare", *job.configured, "--to", job.environment()[VARIABLE]]
    return f"first `{shlex.join(command)}`"


def _advice(job: Job) -> str:
    return f"copy it to {job.bucket.url('files')} (gcloud storage cp -r) and name it {job.bucket.mounted('files')}/..."
