"""What to check before paying for slices: their price, whether the arms fit in memory, where the bucket is."""

import importlib.util
import shlex
import shutil
import subprocess

from rich.console import Console

from common.errors import UserError
from experiments.launching.job import Job
from experiments.planning.compiling import PlannedProgram, compile_all
from experiments.study import Study

GIB = 2**30
GCLOUD_SECONDS = 60
"""How long to wait for an answer from `gcloud`."""


def facts(job: Job, study: Study, console: Console) -> dict[str, str]:
    """One line of text for each of price, fit and bucket."""
    return {"price": price(job), "fit": fit(job, study, console), "bucket": bucket(job)}


def price(job: Job) -> str:
    """The list price of the slices for an hour and a day."""
    if job.topology is None:
        return f"unknown; SkyPilot takes the cheapest machine with {job.cpus} cores"
    listed = job.topology.chip_spec.price
    if listed is None:
        return f"no list price of {job.topology.chip} is known"
    is_spot = job.spot and listed.spot is not None
    chip_hour = listed.spot if job.spot and listed.spot is not None else listed.on_demand
    kind = "spot" if is_spot else "on demand"
    hour = chip_hour * job.topology.chips
    return f"{hour:,.2f} USD an hour, {24 * hour:,.0f} a day ({kind}, list price in {listed.region})"


def fit(job: Job, study: Study, console: Console) -> str:
    """Memory per device for each arm, from the TPU compiler; shares the cache of `twinstack plan`."""
    if job.topology is None:
        return f"unknown; {shlex.join(['twinstack', 'plan', *job.configured])} tells what a run needs"
    command = shlex.join(["twinstack", "plan", *job.configured, "--topology", str(job.topology)])
    if not has_compiler():
        return f"unknown: pip install 'twinstack[plan]', then {command}"
    steps = [PlannedProgram(name=arm, run=run, topology=job.topology) for arm, run in study.arms.items()]
    try:
        compiled = compile_all(steps, console)
    except UserError as error:
        return f"unknown: {error}"
    answers = []
    for arm, answer in zip(study.arms, compiled, strict=True):
        if answer.out_of_memory is None:
            assert answer.memory is not None
            answers.append(f"{arm} fits, {answer.memory.total / GIB:.2f} GiB a device")
        else:
            needed, available = answer.out_of_memory.needed / GIB, answer.out_of_memory.available / GIB
            answers.append(f"{arm} does NOT fit, it needs {needed:.2f} GiB a device of {available:.2f}; try {command}")
    return "; ".join(answers)


def has_compiler() -> bool:
    """Whether the TPU compiler is installed on this machine."""
    return importlib.util.find_spec("libtpu") is not None


def bucket(job: Job) -> str:
    """The bucket's region and the slices' zone, with a warning if they differ."""
    url = f"gs://{job.bucket.name}"
    command = ["gcloud", "storage", "buckets", "describe", url, "--format=value(location)"]
    zone = "the engine chooses the zone" if job.zone is None else f"the slices will be in {job.zone}"
    location = _output_of(command)
    if not location:
        return f"{url}: its region is unknown ({shlex.join(command)} failed); {zone}"
    elsewhere = job.zone is not None and not job.zone.startswith(location.lower())
    costs = ": traffic between regions is slow and costs money" if elsewhere else ""
    return f"{url} is in {location}; {zone}{costs}"


def _output_of(command: list[str]) -> str:
    """What a command prints; empty if it is not installed, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        found = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GCLOUD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
