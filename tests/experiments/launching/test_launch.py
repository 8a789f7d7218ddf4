"""What is written for the engines: held against SkyPilot's schema and gcloud's own parser where they are installed, and
run here with stand-ins for the programs of a host.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import jax
import pytest
import yaml

from common.compute.aot import OutOfMemory
from common.config import apply_overrides
from common.data.sources.config import parts_of
from common.data.tokenized import remote_folder
from common.data.tokenized.origins import keep_source
from common.errors import UserError
from common.sharding.shape import MeshShape
from experiments.cli.main import main
from experiments.launching import facts, gcloud, sky, source
from experiments.launching import launch as launching
from experiments.launching.job import LOCAL, MOUNT, Bucket, Job
from experiments.launching.slices import RENTED, accelerator_type, rentable
from experiments.registry import load
from experiments.running.jax_setup import set_up_jax
from tests.common.data.memory_source import MemorySource

HOSTILE = "data.source.name=tsv:/a b'\"$(touch pwned)`touch pwned`;touch pwned\n>pwned \\"
JOB = Job(
    run="first-light",
    experiment="first_light",
    overrides=("train.mesh.fsdp=32", HOSTILE),
    arm="gpt",
    commit="0123456789abcdef0123456789abcdef01234567",
    topology=rentable("v5p-64", 1),
    bucket=Bucket.of("gs://my-bucket/me"),
    zone="us-east5-a",
    spot=True,
)
JOBS = {
    "spot": JOB,
    "anywhere": dataclasses.replace(JOB, zone=None, spot=False, arm=None, topology=rentable("v6e:4x4", 1)),
    "one-chip": dataclasses.replace(JOB, topology=rentable("v5litepod-1", 1), bucket=Bucket.of("gs://my-bucket")),
}
TWO_SLICES = dataclasses.replace(JOB, topology=rentable("v5p-64", 2))

COMMAND = ["first_light", *JOB.overrides, "--arm", "gpt", "--run-dir", "/mnt/twinstack/me/runs/first-light"]


# Slices


@pytest.mark.parametrize(
    ("name", "form", "chips"),
    [  # of the tables in Cloud TPU's documentation
        ("v4-8", "v4:2x2x1", 4),
        ("v4-4096", "v4:8x16x16", 2048),
        ("v5litepod-1", "v5e:1x1", 1),
        ("v5litepod-256", "v5e:16x16", 256),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p-64", "v5p:2x4x4", 32),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("v6e-16", "v6e:4x4", 16),
    ],
)
def test_accelerator_types_and_grids_name_the_same_slices(name, form, chips):
    found = rentable(name, 1)
    assert (str(found), found.chips) == (form, chips)
    assert rentable(form, 1) == found
    assert accelerator_type(found) == name == accelerator_type(rentable(form, 3))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-60", "nearest: v5p:2x4x4"),
        ("v6p-8", "did you mean 'v6e'?"),
        ("v6e-16 --quiet", "must be CHIP:GRID"),
        ("v5p:4x8x4", "nearest: v5p:4x4x8"),
        ("v6e", "must be CHIP:GRID"),
        ("v5p:4x4x16", "has no accelerator type of its own; nearest: v5p:4x8x8 (v5p-512)"),
        ("tpu7x:2x2x1", "the Cloud TPU API, which both engines ask, has no tpu7x; it has v4, v5e, v5p, v6e"),
    ],
)
def test_a_slice_that_cannot_be_rented(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        rentable(name, 1)


# The job


@pytest.mark.parametrize(
    "url",
    [
        *[
            "my-bucket",
            "s3://my-bucket",
            "gs://",
            "gs://My",
            "gs://my bucket",
            "gs://my-bucket;x",
            "gs://my-bucket/$(x)",
        ],
        *[
            "gs://my-bucket/a b",
            "gs://my-bucket/../other",
            "gs://my-bucket//me",
            "gs://my-bucket/me\n",
            "gs://my-bucket/'",
        ],
    ],
)
def test_a_bucket_that_is_none(url):
    with pytest.raises(UserError, match="must be gs://BUCKET"):
        Bucket.of(url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "First Light"}, "nearest: first-light"),
        ({"run": "-x"}, "nearest: x"),
        ({"run": "a" * 41}, f"nearest: {'a' * 40}"),
        ({"run": "$(touch pwned)"}, "nearest: touch-pwned"),
        ({"zone": "us-east5"}, "such as us-east5-a"),
        ({"zone": "us-east5-a --quiet"}, "such as us-east5-a"),
    ],
)
def test_a_job_that_is_none(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        dataclasses.replace(JOB, **change)


def test_the_mesh_is_that_of_the_slices():
    launching.check_mesh(MeshShape(data=4, fsdp=8), JOB)
    launching.check_mesh(MeshShape(replica=2, fsdp=8, tensor=4), TWO_SLICES)
    for mesh in (MeshShape(), MeshShape(fsdp=64)):
        with pytest.raises(
            UserError, match=f"{mesh} is not for 1 x v5p-64 .v5p:2x4x4: 32 chips.; nearest: train.mesh.fsdp=32$"
        ):
            launching.check_mesh(mesh, JOB)
    with pytest.raises(UserError, match="nearest: train.mesh.data=1$"):
        launching.check_mesh(MeshShape(fsdp=2), JOBS["one-chip"])
    for mesh in (MeshShape(fsdp=32), MeshShape(fsdp=64), MeshShape(replica=4, fsdp=16)):
        with pytest.raises(UserError, match="nearest: train.mesh.replica=2 train.mesh.fsdp=32$"):
            launching.check_mesh(mesh, TWO_SLICES)


def test_compiled_programs_go_where_a_job_says(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "bucket"))
    try:
        set_up_jax()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "bucket")
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        set_up_jax()
        assert jax.config.jax_compilation_cache_dir == str(Path(os.environ["TWINSTACK_CACHE"]) / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# The code


@pytest.fixture
def repository(tmp_path) -> Path:
    """Of two commits, the older of which is checked out."""
    root = tmp_path / "repository"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch=main")
    for text in ("older", "newer"):
        (root / "file").write_text(text)
        git(root, "add", "file")
        git(root, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "--message", text)
    git(root, "checkout", "--quiet", "--detach", "HEAD~1")
    return root


def git(root: Path, *arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.mark.parametrize("name", ["file", "untracked"])
def test_what_is_in_no_commit_is_not_launched(repository, name):
    assert source.committed(repository) == git(repository, "rev-parse", "main~1")
    (repository / name).write_text("changed")
    with pytest.raises(UserError, match=re.escape(f"changes in no commit ({name})")):
        source.committed(repository)


def test_only_a_checkout_is_launched(tmp_path):
    with pytest.raises(UserError, match="is no git checkout"):
        source.committed(tmp_path)


# SkyPilot

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
    """By the interpreter that its program has: its requirements do not go with constraints.txt."""
    program = shutil.which("sky")
    if program is None:
        pytest.skip("SkyPilot's program `sky` is not on the path; `make test-slow` installs it, apart from twinstack")
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
def test_skypilot_refuses_what_is_no_task(change, tmp_path):
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


def test_skypilot_makes_no_multislice():
    with pytest.raises(UserError, match="--slices 2: SkyPilot makes no Multislice; take --engine gcloud"):
        sky.task(TWO_SLICES)


# gcloud


def state_command(job: Job) -> list[str]:
    """As the script asks."""
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
def test_gcloud_reads_the_commands(command, status, tmp_path):
    """Without an account it reads its arguments, and stops (1); what it cannot read has status 2."""
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
def test_the_request_has_what_gcloud_documents(job):
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


# Scripts


def program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("job", [*JOBS.values(), TWO_SLICES], ids=[*JOBS, "two-slices"])
def test_bash_reads_every_script(job):
    task = sky.task(dataclasses.replace(job, topology=dataclasses.replace(job.topology, slices=1)))
    for script in (task["setup"], task["run"], gcloud.startup_script(job), gcloud.launch_script(job)):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


LOGS = "gs://my-bucket/me/logs/first-light"
HOST = {
    "mountpoint": "exit 0",
    "gcsfuse": "exit 1",
    "sleep": '[ "$1" != 300 ]',  # at once, but for the log, which is sent at the end alone
    "hostname": "echo host-7",
    # What Cloud TPU tells a host of itself.
    "curl": """case "${@: -1}" in
*/agent-worker-number) echo "$WORKER" ;;
*/instance/zone) echo projects/12/zones/us-east5-a ;;
*/tpu-env) [ -z "$SLICE" ] && exit 22; printf "NODE_ID: 'x'\\nMEGASCALE_SLICE_ID: '%s'\\n" "$SLICE" ;;
esac""",
    "gcloud": """case "$*" in
"storage cp - "*) echo "$4 $(cat)" >>ended ;;
"storage cp "*) cp "$3" sent.log && echo "$4" >sent ;;
"storage cat "*) cat before 2>/dev/null ;;
*" delete "*) [ ! -e kept ] && echo "$*" >>given-back ;;
esac""",
    # Installs a twinstack that writes down how it was called and ends with the next status.
    "python3": """[ "$*" = "-m uv venv --quiet --python 3.12 .venv" ] || exit 0
mkdir -p .venv/bin
cp "$HOST/twinstack" .venv/bin/""",
    "twinstack": """cd "$HOST/.."
printf '%s\\0' "$@" >>arguments
git -C "$OLDPWD" describe --always --dirty --abbrev=12 >>commits
env | grep -E '^(TWINSTACK|JAX)_' | sort >environment
status=$(head -n 1 statuses)
sed -i 1d statuses
case $status in *+) echo >>saves; mkdir -p "${@: -1}/gpt/checkpoints/$(wc -l <saves)"; status=${status%+} ;; esac
exit "$status" """,
}


@pytest.fixture
def host(tmp_path, repository):
    """Runs the startup script as a host does, given the statuses that the command ends with."""
    for name, body in HOST.items():
        program(tmp_path / "host", name, body)
    job = dataclasses.replace(JOB, commit=source.committed(repository))
    script = gcloud.startup_script(job).replace(str(MOUNT), f"{tmp_path}/mnt").replace(str(LOCAL), f"{tmp_path}/local")
    (tmp_path / "startup.sh").write_text(script.replace("HOME=/root", f"HOME={tmp_path}"))
    source.write_bundle(tmp_path / "mnt/me/source" / f"{job.commit}.bundle", repository)

    def boot(statuses: list[int | str], worker: int = 0, slice_id: str = "") -> tuple[int, str, int]:
        """Exit status, what the bucket is told, times that the command was run."""
        (tmp_path / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        environment = {"PATH": f"{tmp_path}/host:{os.environ['PATH']}", "HOST": f"{tmp_path}/host"}
        environment |= {"WORKER": str(worker), "SLICE": slice_id, "GIT_CONFIG_GLOBAL": "/dev/null"}
        run = subprocess.run(["bash", "startup.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        ended = tmp_path / "ended"
        commits = (tmp_path / "commits").read_text().splitlines()
        assert set(commits) == {job.commit[:12]}, run.stderr + (tmp_path / "local/host-7.log").read_text()
        assert (tmp_path / "sent.log").read_text() and (tmp_path / "sent").read_text() == f"{LOGS}/\n"
        assert not list(tmp_path.rglob("pwned"))
        return run.returncode, ended.read_text() if ended.exists() else "", len(commits)

    return boot


@pytest.mark.parametrize(
    ("statuses", "ended", "runs"),
    [
        ([0], 0, 1),
        ([2], 2, 1),  # a mistake of the user's
        ([1, 143, 1, 143, 0], 0, 5),  # asked to end is no failure
        ([1, 134, 1], 1, 3),
        ([75, 143, 75, 143, 75, 0], 0, 6),  # hung, or asked to end
        (["1+", "1+", 1, "134+", 1, 1, 134], 134, 7),  # what saved something is no failure in a row
    ],
)
def test_a_host_tries_again_and_says_how_it_ended(host, statuses, ended, runs):
    assert host(statuses) == (ended, f"gs://my-bucket/me/ended/first-light {ended}\n", runs)


@pytest.mark.parametrize(("worker", "slice_id"), [(3, ""), (0, "1"), (0, "10")])
def test_other_hosts_tell_only_of_failures(host, worker, slice_id):
    assert host([0], worker, slice_id) == (0, "", 1)
    assert host([2], worker, slice_id) == (2, "gs://my-bucket/me/ended/first-light 2\n", 2)


def test_the_first_host_of_the_first_slice_tells_of_success(host):
    assert host([0], worker=0, slice_id="0")[1] == "gs://my-bucket/me/ended/first-light 0\n"


def test_a_host_runs_the_command_as_it_was_given(host, tmp_path):
    host([0])
    expected = ["train", *COMMAND[:-1], f"{tmp_path}/mnt/me/runs/first-light"]
    assert (tmp_path / "arguments").read_text().split("\0")[:-1] == expected
    told = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    assert told == {
        "TWINSTACK_CACHE": f"{tmp_path}/local/cache",
        "TWINSTACK_PREPARED": "gs://my-bucket/me/prepared",
        "TWINSTACK_SHARED_DATA": f"{tmp_path}/mnt/me/data",
        "JAX_COMPILATION_CACHE_DIR": "gs://my-bucket/me/xla",
    }


def test_skypilot_runs_the_same_commands():
    task = sky.task(JOB)
    script = gcloud.startup_script(JOB)
    for line in (*JOB.setup(), *JOB.main()):
        assert line in script and line in task["setup"] + task["run"]


WAITING = """
trap 'touch asked-to-end; exit 143' TERM
while true; do /bin/sleep 0.1; done
"""
GIVEN_BACK = "compute tpus queued-resources delete first-light --force --quiet --zone=us-east5-a\n"


def test_the_last_host_gives_the_slices_back(host, tmp_path):
    host([0])
    assert (tmp_path / "given-back").read_text() == GIVEN_BACK
    assert "the run has ended with status 0" in (tmp_path / "sent.log").read_text()


def test_other_hosts_give_nothing_back(host, tmp_path):
    host([0], worker=3)
    assert not (tmp_path / "given-back").exists()


def test_a_host_that_may_not_give_back_says_so_and_ends(host, tmp_path):
    (tmp_path / "kept").touch()
    assert host([2])[0] == 2
    assert "the service account needs roles/tpu.admin" in (tmp_path / "sent.log").read_text()


def test_a_host_that_boots_after_the_end_gives_itself_back(host, tmp_path):
    host([0])
    (tmp_path / "before").write_text("0\n")
    assert host([1])[2] == 1, "run once more"
    assert (tmp_path / "given-back").read_text() == 2 * GIVEN_BACK


def test_slices_end_when_they_are_as_old_as_they_may_be(host, tmp_path):
    """A second before its time is over, the command is asked to end."""
    script = (tmp_path / "startup.sh").read_text()
    assert "left=$((604800 - SECONDS))\n  if [ $left -lt 60 ]" in script
    (tmp_path / "startup.sh").write_text(script.replace("604800", "2").replace("-lt 60", "-lt 1"))
    program(tmp_path / "host", "twinstack", HOST["twinstack"].replace('exit "$status"', WAITING))
    assert host([0])[:2] == (124, "gs://my-bucket/me/ended/first-light 124\n")
    assert (tmp_path / "asked-to-end").exists() and (tmp_path / "given-back").read_text() == GIVEN_BACK


def test_a_longest_life_may_be_asked_for():
    assert f"left=$(({5 * 3600} - SECONDS))" in gcloud.startup_script(dataclasses.replace(JOB, hours=5))
    with pytest.raises(UserError, match="--hours 5 is for --engine gcloud"):
        sky.task(dataclasses.replace(JOB, hours=5))


@pytest.mark.parametrize("status", [143, 0, 1])
def test_a_signal_reaches_the_command_whose_status_counts(tmp_path, status):
    """SkyPilot's may be sent to the script alone."""
    source = tmp_path / "source"
    saving = f"trap 'sleep 0.3; echo saved >>saved; exit {status}' TERM; touch begun; while true; do sleep 0.1; done"
    program(source / ".venv/bin", "twinstack", saving)
    script = sky.task(JOB)["run"].replace(str(LOCAL), str(tmp_path))
    with subprocess.Popen(["bash", "-c", script], start_new_session=True) as job:
        while not (source / "begun").exists():
            time.sleep(0.01)
        job.terminate()
    assert (source / "saved").read_text() == "saved\n" and job.returncode == status


CLOUD = """case "$*" in
*" describe "*) [ -s states ] || echo "NOT_FOUND: no such resource" >&2; head -n 1 states; sed -i 1d states ;;
"storage cat "*) [ -s states ] && exit 1; cat ended ;;
*) echo "$*" | grep -oE "\\b(create|delete|cp|rm)\\b" | head -n 1 >>done; [ "$(tail -n 1 done)" != rm ] ;;
esac"""
GONE = """ && { [[ "$*" != *" delete "* ]] || [ -s states ]; }"""
"""Once the run has ended there is nothing to delete any more."""


@pytest.mark.parametrize(
    ("states", "ended", "done"),
    [
        (["", "ACTIVE", "ACTIVE"], 0, "cp rm create delete"),
        (["", "WAITING_FOR_RESOURCES", "ACTIVE"], 2, "cp rm create delete"),
        (["", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"], 0, "cp rm create delete create delete"),
        (["", "FAILED", "", "SUSPENDED", "", "ACTIVE"], 1, "cp rm create delete create delete create delete"),
        (["ACTIVE", "ACTIVE"], 0, "delete"),  # started anew: it watches, and forgets nothing
        (["", "ACTIVE", ""], 0, "cp rm create delete"),  # a host has just ended the run, and gave the slices back
    ],
)
@pytest.mark.parametrize("they_may", [True, False], ids=["hosts-give-back", "hosts-may-not"])
def test_slices_are_asked_for_again_and_given_back(tmp_path, states, ended, done, they_may):
    gcloud.write(JOB, tmp_path)
    program(tmp_path / "programs", "gcloud", CLOUD + (GONE if they_may else ""))
    program(tmp_path / "programs", "sleep", "exit 0")
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "ended").write_text(f"{ended}\n")
    environment = {"PATH": f"{tmp_path}/programs:{os.environ['PATH']}"}
    run = subprocess.run(["bash", str(tmp_path / gcloud.LAUNCH)], env=environment, capture_output=True, text=True)
    assert run.returncode == ended and f"has ended with status {ended}" in run.stdout, run.stderr
    assert (tmp_path / "done").read_text().split() == done.split()
    assert not (tmp_path / gcloud.ASKED).exists(), "launched once more, it asks for slices anew"


def test_a_watch_that_goes_on_after_the_end_asks_for_nothing(tmp_path):
    gcloud.write(JOB, tmp_path)
    program(tmp_path / "programs", "gcloud", CLOUD + GONE)
    (tmp_path / "states").touch()
    (tmp_path / "ended").write_text("0\n")
    (tmp_path / gcloud.ASKED).touch()
    environment = {"PATH": f"{tmp_path}/programs:{os.environ['PATH']}"}
    subprocess.run(["bash", str(tmp_path / gcloud.LAUNCH)], env=environment, capture_output=True, check=True)
    assert (tmp_path / "done").read_text() == "delete\n"


# The command

ARGUMENTS = ["launch", "first_light", "--topology", "v6e-4", "--bucket", "gs://my-bucket", "train.mesh.fsdp=4"]


COMPILED = {
    "t5like": SimpleNamespace(out_of_memory=None, memory=SimpleNamespace(total=3 * 2**29)),
    "gpt": SimpleNamespace(out_of_memory=OutOfMemory(needed=40 * 2**30, available=31 * 2**30), memory=None),
}
"""The compiler's answer, in place of a minute of its work."""


@pytest.fixture
def here(monkeypatch, tmp_path, repository) -> Path:
    """A folder to launch from, on a machine that has neither engine, whatever is checked out there."""
    commit = source.committed(repository)
    monkeypatch.setattr(source, "committed", lambda: commit)
    monkeypatch.setattr(launching, "write_bundle", lambda path: source.write_bundle(path, repository))
    monkeypatch.setattr(remote_folder, "file_system", lambda url: fsspec.filesystem("memory"))  # in place of a bucket
    monkeypatch.setattr(facts, "has_compiler", lambda: True)
    monkeypatch.setattr(facts, "compile_all", lambda steps, console: [COMPILED[step.arm] for step in steps])
    program(tmp_path / "programs", "git", f'exec {shutil.which("git")} "$@"')
    program(tmp_path / "programs", "bash", f'exec {shutil.which("bash")} "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_launch_writes_and_says_what_to_do(here, capsys):
    assert main([*ARGUMENTS, "--run", "mine", "--spot"]) == 0
    printed = capsys.readouterr().out
    assert "twinstack data prepare first_light train.mesh.fsdp=4 --to gs://my-bucket/prepared\n" in printed
    assert "then: sky jobs launch --yes --name mine runs/launch/mine/sky.yaml\n" in printed
    folder = here / "runs/launch/mine"
    task = yaml.safe_load((folder / "sky.yaml").read_text())
    assert task["resources"]["accelerators"] == "tpu-v6e-4" and task["resources"]["use_spot"] is True
    assert "compare first_light train.mesh.fsdp=4 --run-dir /mnt/twinstack/runs/mine &\n" in task["run"]
    assert {path.name for path in folder.iterdir()} == {"sky.yaml", "source.bundle"}


def test_launch_writes_scripts_for_gcloud(here, capsys):
    assert main([*ARGUMENTS, "--engine", "gcloud", "--arm", "gpt", "--out", "there"]) == 0
    assert "then: bash there/launch.sh\n" in capsys.readouterr().out
    assert {path.name for path in (here / "there").iterdir()} == {"launch.sh", "startup.sh", "source.bundle"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--go"], "--go needs the program 'gcloud', which is not installed"),
        (["--go", "--engine", "gcloud"], "--go needs the program 'gcloud', which is not installed"),
        (["--engine", "slurm"], "--engine 'slurm': valid: gcloud, sky"),
        (["--arm", "gtp"], "unknown arm 'gtp': did you mean 'gpt'?"),
        (
            ["train.mesh.fsdp=8"],
            "train.mesh fsdp=8 is not for 1 x v6e-4 (v6e:2x2: 4 chips); nearest: train.mesh.fsdp=4",
        ),
        (["train.mesh.fdsp=8"], "unknown field 'fdsp' in train.mesh: did you mean 'fsdp'?"),
        (["--topology", "v6e:2x3"], "topology 'v6e:2x3': no slice has this shape; nearest: v6e:2x4"),
        (["--slices", "2", "train.mesh.replica=2"], "--slices 2: SkyPilot makes no Multislice"),
        (["--zone", "nowhere"], "--zone 'nowhere' must be a zone"),
        (["--run", "Mine"], "--run 'Mine' must be lower-case"),
        (["--bucket", "mine"], "--bucket 'mine' must be gs://BUCKET"),
        (["--hours", "9"], "--hours 9 is for --engine gcloud"),
        (["data.rows=6"], "data.rows is 6, which does not divide by replica x data x fsdp x accumulation"),
        (["--env", "ABSENT"], "--env ABSENT: it is not set here; give --env ABSENT=VALUE"),
        (["--env", "A B=1"], "--env 'A B=1' must be NAME=VALUE or NAME"),
        (["--env", "A=1\n2"], "--env A: its value holds a line break"),
        *[
            ([f"data.source.name={name}"], f"data.source.name={name} is on this machine, where hosts cannot read it")
            for name in ("tsv:/a/laptop/path/{split}.tsv", "jsonl:~/x.jsonl", "text:here/{split}", "parquet:/x")
        ],
        (
            ["data.tokenizer.path=/a/spiece.model"],
            "data.tokenizer.path /a/spiece.model is on this machine, where hosts cannot read it, and "
            "gs://my-bucket/prepared has nothing prepared from it: first `twinstack data prepare first_light",
        ),
        (
            ['arms.gpt.init={"path":"runs/first"}'],
            "arms.gpt.init.path runs/first is on this machine, where hosts cannot read it; copy it to "
            "gs://my-bucket/files (gcloud storage cp -r) and name it /mnt/twinstack/files/...",
        ),
        (
            ["data.source.name=tfds:c4/en"],
            "data.source.name=tfds:c4/en: hosts find it in $TFDS_DATA_DIR, which nothing names, and "
            "gs://my-bucket/prepared has nothing prepared from it: add --env TFDS_DATA_DIR=gs://my-bucket/tfds",
        ),
        (
            ["data.source.name=tfds:c4/en", "--env", "TFDS_DATA_DIR=/home/me/tfds"],
            "data.source.name=tfds:c4/en: hosts find it in $TFDS_DATA_DIR, which is a folder of this machine "
            "(/home/me/tfds)",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(here, capsys, arguments, message):
    assert main([*ARGUMENTS, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"twinstack: error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["data.source.name=tsv:gs://my-bucket/data/{split}.tsv"],
        ["data.source.name=jsonl:/mnt/twinstack/data/{split}.jsonl"],
        ["data.tokenizer.path=/mnt/twinstack/files/spiece.model"],
        ["data.source.name=tfds:c4/en", "--env", "TFDS_DATA_DIR=gs://my-bucket/tfds"],
        ["data.source.name=corpus:multi30k"],
        ['arms.gpt.init={"path":"runs/first"}', "--arm", "t5like"],
    ],
)
def test_what_hosts_can_read_is_launched(here, arguments):
    assert main([*ARGUMENTS, *arguments]) == 0


def test_what_is_prepared_in_the_bucket_needs_no_files(here):
    overrides = ["data.source.name=tsv:/a/laptop/path/{split}.tsv"]
    (part,) = parts_of(apply_overrides(load("first_light"), overrides).data.source)
    bucket = fsspec.filesystem("memory")
    try:
        for split in ("train", "validation", "test", "test_unseen_names"):
            assert main([*ARGUMENTS, *overrides]) == 2
            keep_source("gs://my-bucket/prepared", part, split, MemorySource([]), with_text=False)
        assert main([*ARGUMENTS, *overrides]) == 0
        assert main([*ARGUMENTS, *overrides, "--env", "TWINSTACK_PREPARED=gs://my-bucket/other"]) == 2
    finally:
        bucket.store.clear()


@pytest.mark.parametrize("engine", ["sky", "gcloud"])
def test_variables_are_passed_on(here, monkeypatch, engine):
    monkeypatch.setenv("HERE", "it's `here`")
    assert main([*ARGUMENTS, "--engine", engine, "--env", "HERE", "--env", "THERE=a=b", "--out", "there"]) == 0
    if engine == "sky":
        told = yaml.safe_load((here / "there/sky.yaml").read_text())["envs"]
    else:
        script = (here / "there/startup.sh").read_text().partition("\nif ")[0]
        told = subprocess.run(
            ["bash", "-c", f"{script}\n/usr/bin/env -0"], capture_output=True, text=True, check=True
        ).stdout
        told = dict(line.split("=", 1) for line in told.split("\0")[:-1])
    assert (told["HERE"], told["THERE"]) == ("it's `here`", "a=b")
    assert told["TWINSTACK_PREPARED"] == "gs://my-bucket/prepared"


def test_price_fit_region_and_remarks_are_said_before_anything_is_paid_for(here, capsys):
    unequal = ["arms.gpt.model.d_ff=64", "--zone", "us-central1-b", "--engine", "gcloud"]
    program(here / "programs", "gcloud", 'case "$*" in *"buckets describe gs://my-bucket "*) echo US-EAST5 ;; esac')
    assert main([*ARGUMENTS, "--spot", *unequal]) == 0
    printed = capsys.readouterr().out
    assert "price: 5.40 USD an hour, 130 a day (spot, list price in us-east5)\n" in printed  # 4 chips
    assert "t5like fits, 1.50 GiB a device; gpt does NOT fit, it needs 40.00 GiB a device of 31.00" in printed
    assert "bucket: gs://my-bucket lies in US-EAST5; the slices are to be in us-central1-b: traffic between" in printed
    assert "longest life: 168 hours" in printed
    assert re.search(r"^warning: .*FLOPs", printed, re.MULTILINE)


def test_without_gcloud_the_region_is_unknown(here, capsys):
    assert main([*ARGUMENTS, "--arm", "t5like"]) == 0
    printed = capsys.readouterr().out
    assert "price: 10.80 USD an hour, 259 a day (on demand, list price in us-east5)\n" in printed
    assert "fit: t5like fits, 1.50 GiB a device\n" in printed
    assert "bucket: gs://my-bucket: its region could not be asked for" in printed


def test_without_the_compiler_the_fit_is_unknown(here, monkeypatch, capsys):
    monkeypatch.setattr(facts, "has_compiler", lambda: False)
    assert main([*ARGUMENTS, "--arm", "t5like"]) == 0
    assert "fit: unknown: pip install 'twinstack[plan]', then twinstack plan first_light" in capsys.readouterr().out


def test_the_readme_launches_as_written(here, capsys):
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    commands = re.findall(r"`(twinstack launch [^`]+)`", readme.replace("\n", " "))
    assert commands
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 7])
def test_go_asks_the_engine(here, capsys, status):
    for name in ("gcloud", "sky"):
        program(here / "programs", name, f'echo "{name} $*" >>asked; exit {status if name == "sky" else 0}')
    assert main([*ARGUMENTS, "--go"]) == (2 if status else 0)
    region, upload, submit = (here / "asked").read_text().splitlines()
    assert region == "gcloud storage buckets describe gs://my-bucket --format=value(location)"
    assert upload.startswith("gcloud storage cp runs/launch/first-light/source.bundle gs://my-bucket/source/")
    assert submit == "sky jobs launch --yes --name first-light runs/launch/first-light/sky.yaml"
    assert ("ended with status 7" in capsys.readouterr().err) == bool(status)
