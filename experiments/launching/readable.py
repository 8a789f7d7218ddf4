"""Whether hosts can read what an experiment reads: they have the code, the bucket, and nothing of this machine."""

import re
import shlex
from collections.abc import Callable, Sequence

from common.data.objectives.config import mode_names
from common.data.sources.by_name import BUILT_IN, TFDS_FOLDER
from common.data.sources.config import SourceConfig, parts_of
from common.data.tokenized.origins import has_tokenizer, kept_source
from common.data.tokenized.prepared import VARIABLE
from common.errors import UserError
from experiments.config import Experiment
from experiments.launching.job import MOUNT, Job

_NO_FILES = ("tfds", "corpus")
"""Schemes."""


def check_readable(experiment: Experiment, arms: Sequence[str], job: Job) -> None:
    """Raises UserError for the first path of this machine that hosts would be sent to, and for an unnamed TFDS folder.

    Paths in the mounted bucket are theirs, and sources and tokenizers that are prepared in the bucket need no files.
    """
    for name in arms:
        if (init := experiment.arms[name].init) is not None and not _on_hosts(init.path):
            raise UserError(
                f"arms.{name}.init.path {init.path} is on this machine, where hosts cannot read it; {_advice(job)}"
            )
    tokenizer, modes = experiment.data.tokenizer, mode_names(experiment.data.objective)
    if tokenizer.path is not None and not _on_hosts(tokenizer.path):
        lacking = _lacks(job, lambda where: has_tokenizer(tokenizer, modes, where))
        if lacking:
            raise UserError(
                f"data.tokenizer.path {tokenizer.path} is on this machine, where hosts cannot read it, and {lacking}: "
                f"{_prepare(job)}; or {_advice(job)}"
            )
    for part in parts_of(experiment.data.source):
        splits = dict.fromkeys((part.train_split, part.validation_split, *experiment.evaluation.splits))
        _check_source(part, list(splits), job)


def _check_source(part: SourceConfig, splits: Sequence[str], job: Job) -> None:
    scheme, _, rest = part.name.partition(":")
    named = job.environment().get(TFDS_FOLDER, "")
    is_theirs = scheme == "corpus" or rest.partition(":")[0].partition("/")[0] in BUILT_IN
    if is_theirs if scheme in _NO_FILES else _on_hosts(rest):
        return
    if scheme == "tfds" and _on_hosts(named):
        return
    lacking = _lacks(job, lambda where: all(kept_source(part, split, where) is not None for split in splits))
    if not lacking:
        return
    if scheme == "tfds":
        what = f"is a folder of this machine ({named})" if named else "nothing names"
        raise UserError(
            f"data.source.name={part.name}: hosts find it in ${TFDS_FOLDER}, which {what}, and {lacking}: add --env "
            f"{TFDS_FOLDER}={job.bucket.url('tfds')}, or the url where it lies; or {_prepare(job)}"
        )
    raise UserError(
        f"data.source.name={part.name} is on this machine, where hosts cannot read it, and {lacking}: {_prepare(job)}; "
        f"or copy the files and give {scheme}:{job.bucket.url('data')}/..."
    )


def _lacks(job: Job, has: Callable[[str], bool]) -> str:
    """Why the tokens that hosts read do not suffice; empty where they do."""
    where = job.environment()[VARIABLE]
    try:
        return "" if has(where) else f"{where} has nothing prepared from it"
    except UserError as error:
        return f"whether it is prepared could not be asked ({error})"


def _on_hosts(path: str) -> bool:
    return bool(re.match(r"[a-z0-9]+://", path)) or path.startswith(f"{MOUNT}/")


def _prepare(job: Job) -> str:
    command = ["twinstack", "data", "prepare", *job.configured, "--to", job.environment()[VARIABLE]]
    return f"first `{shlex.join(command)}`"


def _advice(job: Job) -> str:
    return f"copy it to {job.bucket.url('files')} (gcloud storage cp -r) and name it {job.bucket.mounted('files')}/..."
