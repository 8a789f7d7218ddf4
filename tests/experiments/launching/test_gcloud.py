"""The request for slices, checked by gcloud's own parser if it is installed, and the script that watches it."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess

import pytest

from common.errors import UserError
from experiments.launching import gcloud, sky
from experiments.launching.job import Job
from experiments.launching.slices import RENTED, accelerator_type
from tests.experiments.launching.jobs import JOB, JOBS, TWO_SLICES, program


def state_command(job: Job) -> list[str]:
    """The command with which the script queries the state."""
    found = re.search(r"^state\(\) \{ (.*?) 2>", gcloud.launch_script(job), re.MULTILINE)
    assert found is not None
    return shlex.split(found[1])


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (gcloud.create(TWO_SLICES), 1),
        *[pytest.param(gcloud.create(job), 1, marks=pytest.mark.slow) for job in JOBS.values()],
        *[
            pytest.param(shlex.split(text), 1, marks=pytest.mark.slow)
            for text in gcloud.afterwards(TWO_SLICES).values()
        ],
        pytest.param(state_command(JOB), 1, marks=pytest.mark.slow),
        pytest.param([*gcloud.create(JOB), "--node-count=2"], 2, marks=pytest.mark.slow),
        ([*gcloud.create(JOB), "--spots"], 2),
    ],
)
def test_gcloud_accepts_the_commands(command, status, tmp_path):
    """Without an account, gcloud parses its arguments and stops with status 1; unknown arguments give status 2."""
    if shutil.which("gcloud") is None:
        pytest.skip("gcloud is not installed")
    (tmp_path / gcloud.STARTUP).touch()
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path / "config")}
    alone |= {"CLOUDSDK_CORE_PROJECT": "none", "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
    alone |= {"CLOUDSDK_COMPUTE_ZONE": "us-east5-a", "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert run.returncode == status, run.stderr
    assert ("do not currently have an active account" in run.stderr) == (status == 1)


@pytest.mark.parametrize("job", [*JOBS.values(), TWO_SLICES], ids=[*JOBS, "two-slices"])
def test_the_request_has_the_flags_that_gcloud_documents(job):
    words = gcloud.create(job)
    assert words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", job.run]
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words[6:])
    nodes = {"node-count": "2", "node-prefix": job.run} if job.topology.slices == 2 else {"node-id": job.run}
    assert flags == {
        "accelerator-type": accelerator_type(job.topology),
        "runtime-version": RENTED[job.topology.chip].runtime,
        "metadata-from-file": "startup-script=startup.sh",
        "scopes": "https://www.googleapis.com/auth/cloud-platform",
        **nodes,
        **({"zone": job.zone} if job.zone else {}),
        **({"spot": ""} if job.spot else {}),
    }


@pytest.mark.parametrize("job", [*JOBS.values(), TWO_SLICES], ids=[*JOBS, "two-slices"])
def test_bash_accepts_every_script(job):
    task = sky.task(dataclasses.replace(job, topology=dataclasses.replace(job.topology, slices=1)))
    for script in (task["setup"], task["run"], gcloud.startup_script(job), gcloud.launch_script(job)):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_hours_set_the_longest_life():
    assert f"left=$(({5 * 3600} - SECONDS))" in gcloud.startup_script(dataclasses.replace(JOB, hours=5))
    with pytest.raises(UserError, match="--hours 5 is for --engine gcloud"):
        sky.task(dataclasses.replace(JOB, hours=5))


CLOUD = """case "$*" in
*" describe "*) [ -s states ] || echo "NOT_FOUND: no such resource" >&2; head -n 1 states; sed -i 1d states ;;
"storage cat "*) [ -s states ] && exit 1; cat ended ;;
*) echo "$*" | grep -oE "\\b(create|delete|cp|rm)\\b" | head -n 1 >>done; [ "$(tail -n 1 done)" != rm ] ;;
esac"""
GONE = """ && { [[ "$*" != *" delete "* ]] || [ -s states ]; }"""
"""Once the run has ended, the hosts have deleted the slices."""


@pytest.mark.parametrize(
    ("states", "ended", "done"),
    [
        (["", "ACTIVE", "ACTIVE"], 0, "cp rm create delete"),
        (["", "WAITING_FOR_RESOURCES", "ACTIVE"], 2, "cp rm create delete"),
        (["", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"], 0, "cp rm create delete create delete"),
        (["", "FAILED", "", "SUSPENDED", "", "ACTIVE"], 1, "cp rm create delete create delete create delete"),
        (["ACTIVE", "ACTIVE"], 0, "delete"),  # started again: it only watches
        (["", "ACTIVE", ""], 0, "cp rm create delete"),  # a host has just ended the run and deleted the slices
    ],
)
@pytest.mark.parametrize("hosts_delete", [True, False], ids=["hosts-delete", "hosts-may-not"])
def test_slices_are_requested_again_and_deleted(tmp_path, states, ended, done, hosts_delete):
    gcloud.write(JOB, tmp_path)
    program(tmp_path / "programs", "gcloud", CLOUD + (GONE if hosts_delete else ""))
    program(tmp_path / "programs", "sleep", "exit 0")
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "ended").write_text(f"{ended}\n")
    environment = {"PATH": f"{tmp_path}/programs:{os.environ['PATH']}"}
    run = subprocess.run(["bash", str(tmp_path / gcloud.LAUNCH)], env=environment, capture_output=True, text=True)
    assert run.returncode == ended and f"has ended with status {ended}" in run.stdout, run.stderr
    assert (tmp_path / "done").read_text().split() == done.split()
    assert not (tmp_path / gcloud.REQUESTED).exists(), "launched again, it requests new slices"


def test_a_watch_resumed_after_the_end_requests_nothing(tmp_path):
    gcloud.write(JOB, tmp_path)
    program(tmp_path / "programs", "gcloud", CLOUD + GONE)
    (tmp_path / "states").touch()
    (tmp_path / "ended").write_text("0\n")
    (tmp_path / gcloud.REQUESTED).touch()
    environment = {"PATH": f"{tmp_path}/programs:{os.environ['PATH']}"}
    subprocess.run(["bash", str(tmp_path / gcloud.LAUNCH)], env=environment, capture_output=True, check=True)
    assert (tmp_path / "done").read_text() == "delete\n"
