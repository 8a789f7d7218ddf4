"""The task for SkyPilot, checked by SkyPilot's own schema if it is installed."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from common.errors import UserError
from experiments.launching import sky
from experiments.launching.job import LOCAL
from experiments.launching.slices import RENTED, accelerator_type
from tests.experiments.launching.jobs import JOB, JOBS, TWO_SLICES, program

CHECK_TASK = """
import json, sys, jsonschema, yaml, sky
from sky.utils import schemas
task = yaml.safe_load(sys.stdin)
jsonschema.validate(task, schemas.get_task_schema())
jsonschema.validate(task["resources"], schemas.get_resources_schema())
for mount in task["file_mounts"].values():
    jsonschema.validate(mount, schemas.get_storage_schema())
found = sky.Task.from_yaml_config(task)
[resources] = found.resources
mounts = {path: [storage.source, storage.mode.value] for path, storage in found.storage_mounts.items()}
facts = [str(resources.cloud), resources.zone, resources.accelerators, resources.accelerator_args, resources.use_spot]
print(json.dumps([found.name, *facts, resources.job_recovery, mounts, found.num_nodes]))
"""


def ask_skypilot(text: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs `CHECK_TASK` with SkyPilot's own interpreter: its requirements conflict with constraints.txt."""
    program = shutil.which("sky")
    if program is None:
        pytest.skip(
            "SkyPilot's program `sky` is not on the path; `make test-slow` installs it in an environment of its own"
        )
    python = Path(program).read_text().partition("\n")[0].removeprefix("#!").strip()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return subprocess.run([python, "-c", CHECK_TASK], input=text, env=environment, capture_output=True, text=True)


@pytest.mark.slow  # SkyPilot is installed for them
@pytest.mark.parametrize("name", JOBS)
def test_skypilot_reads_the_task(name, tmp_path):
    job = JOBS[name]
    sky.write(job, tmp_path)
    checked = ask_skypilot((tmp_path / sky.TASK).read_text(), tmp_path)
    assert checked.returncode == 0, checked.stderr
    type_, runtime = accelerator_type(job.topology), RENTED[job.topology.chip].runtime
    recovery = {"strategy": "FAILOVER", "max_restarts_on_errors": 2, "recover_on_exit_codes": [75, 143]}
    assert json.loads(checked.stdout) == [
        "first-light",
        "GCP",
        job.zone,
        {f"tpu-{type_}": 1},
        {"runtime_version": runtime, "tpu_vm": True},
        job.spot,
        recovery,
        {"/mnt/twinstack": ["gs://my-bucket", "MOUNT"]},
        1,
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"use_spot": "yes"},
        {"infra": "gpc"},
        {"job_recovery": {"max_restarts_on_errors": -1}},
        {"accelerator": "tpu-v5p-64"},
    ],
)
def test_skypilot_refuses_an_invalid_task(change, tmp_path):
    task = sky.task(JOB)
    checked = ask_skypilot(yaml.safe_dump(task | {"resources": task["resources"] | change}), tmp_path)
    assert checked.returncode != 0 and "ValidationError" in checked.stderr


@pytest.mark.parametrize("name", JOBS)
def test_the_file_is_the_task(name, tmp_path):
    job = JOBS[name]
    upload, submit = sky.write(job, tmp_path)
    text = (tmp_path / sky.TASK).read_text()
    assert yaml.safe_load(text) == sky.task(job) and "setup: |\n" in text
    assert upload == ["gcloud", "storage", "cp", str(tmp_path / "source.bundle"), job.bundle_url]
    assert submit[:4] == ["sky", "jobs", "launch", "--yes"] and submit[-1] == str(tmp_path / sky.TASK)


def test_skypilot_does_not_support_multislice():
    with pytest.raises(UserError, match="--slices 2: SkyPilot does not support Multislice; take --engine gcloud"):
        sky.task(TWO_SLICES)


@pytest.mark.parametrize("status", [143, 0, 1])
def test_a_signal_reaches_the_command_whose_status_counts(tmp_path, status):
    """SkyPilot may send the signal to the script only."""
    source = tmp_path / "source"
    saving = f"trap 'sleep 0.3; echo saved >>saved; exit {status}' TERM; touch begun; while true; do sleep 0.1; done"
    program(source / ".venv/bin", "twinstack", saving)
    script = sky.task(JOB)["run"].replace(str(LOCAL), str(tmp_path))
    with subprocess.Popen(["bash", "-c", script], start_new_session=True) as job:
        while not (source / "begun").exists():
            time.sleep(0.01)
        job.terminate()
    assert (source / "saved").read_text() == "saved\n" and job.returncode == status
