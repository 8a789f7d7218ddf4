"""Facts to check before paying for slices: their price, whether the arms fit, where the bucket lies."""

import importlib.util
import shlex
import shutil
import subprocess

from rich.console import Console

from common.errors import UserError
from experiments.config import Experiment
from experiments.launching.job import Job
from experiments.planning.compiling import PlannedProgram, compile_all

GIB = 2**30
SECONDS = 60
"""The longest that `gcloud` may take to answer."""


def facts(job: Job, experiment: Experiment, console: Console) -> dict[str, str]:
    """Purpose -> words."""
    return {"price": price(job), "fit": fit(job, experiment, console), "bucket": bucket(job)}


def price(job: Job) -> str:
    """The list price of an hour and of a day."""
    listed = job.topology.chip_spec.price
    if listed is None:
        return f"no list price of {job.topology.chip} is known"
    each = listed.spot if job.spot and listed.spot is not None else listed.on_demand
    kind = "spot" if job.spot and listed.spot is not None else "on demand"
    hour = each * job.topology.chips
    return f"{hour:,.2f} USD an hour, {24 * hour:,.0f} a day ({kind}, list price in {listed.region})"


def fit(job: Job, experiment: Experiment, console: Console) -> str:
    """Memory of a device, as the TPU's compiler reports it; answers are cached, including those of `twinstack plan`."""
    arms = list(experiment.arms) if job.arm is None else [job.arm]
    command = shlex.join(["twinstack", "plan", *job.configured, "--topology", str(job.topology)])
    if not has_compiler():
        return f"unknown: pip install 'twinstack[plan]', then {command}"
    steps = [PlannedProgram(experiment=experiment, arm=arm, topology=job.topology) for arm in arms]
    try:
        compiled = compile_all(steps, console)
    except UserError as error:
        return f"unknown: {error}"
    told = []
    for arm, answer in zip(arms, compiled, strict=True):
        if answer.out_of_memory is None:
            assert answer.memory is not None
            told.append(f"{arm} fits, {answer.memory.total / GIB:.2f} GiB a device")
        else:
            needed, available = answer.out_of_memory.needed / GIB, answer.out_of_memory.available / GIB
            told.append(f"{arm} does NOT fit, it needs {needed:.2f} GiB a device of {available:.2f}; ask {command}")
    return "; ".join(told)


def has_compiler() -> bool:
    """Whether the TPU's compiler is installed here."""
    return importlib.util.find_spec("libtpu") is not None


def bucket(job: Job) -> str:
    """The location of the bucket, beside that of the slices."""
    url = f"gs://{job.bucket.name}"
    command = ["gcloud", "storage", "buckets", "describe", url, "--format=value(location)"]
    zone = "zones are the engine's choice" if job.zone is None else f"the slices are to be in {job.zone}"
    location = _asked(command)
    if not location:
        return f"{url}: its region could not be asked for ({shlex.join(command)}); {zone}"
    apart = job.zone is not None and not job.zone.startswith(location.lower())
    costs = ": traffic between regions is slow and paid for" if apart else ""
    return f"{url} lies in {location}; {zone}{costs}"


def _asked(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        found = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
