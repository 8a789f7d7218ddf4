"""The script that a host runs when it boots, run here with stand-ins for the host's programs."""

import dataclasses
import os
import subprocess

import pytest

from experiments.launching import gcloud, sky, source
from experiments.launching.job import LOCAL, MOUNT
from tests.experiments.launching.jobs import COMMAND, JOB, program

LOGS = "gs://my-bucket/me/logs/first-light"
HOST = {
    "mountpoint": "exit 0",
    "gcsfuse": "exit 1",
    "sleep": '[ "$1" != 300 ]',  # returns at once, but fails for the loop that sends the log
    "hostname": "echo host-7",
    # Cloud TPU's metadata of a host.
    "curl": """case "${@: -1}" in
*/agent-worker-number) echo "$WORKER" ;;
*/instance/zone) echo projects/12/zones/us-east5-a ;;
*/tpu-env) [ -z "$SLICE" ] && exit 22; printf "NODE_ID: 'x'\\nMEGASCALE_SLICE_ID: '%s'\\n" "$SLICE" ;;
esac""",
    "gcloud": """case "$*" in
"storage cp - "*) echo "$4 $(cat)" >>ended ;;
"storage cp "*) cp "$3" sent.log && echo "$4" >sent ;;
"storage cat "*) cat before 2>/dev/null ;;
*" delete "*) [ ! -e kept ] && echo "$*" >>deleted ;;
esac""",
    # Installs a twinstack that records its call and exits with the next status.
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
    """Runs the startup script as a host does, with a command that exits with the given statuses in turn."""
    for name, body in HOST.items():
        program(tmp_path / "host", name, body)
    job = dataclasses.replace(JOB, commit=source.committed(repository))
    script = gcloud.startup_script(job).replace(str(MOUNT), f"{tmp_path}/mnt").replace(str(LOCAL), f"{tmp_path}/local")
    (tmp_path / "startup.sh").write_text(script.replace("HOME=/root", f"HOME={tmp_path}"))
    source.write_bundle(tmp_path / "mnt/me/source" / f"{job.commit}.bundle", repository)

    def boot(statuses: list[int | str], worker: int = 0, slice_id: str = "") -> tuple[int, str, int]:
        """(exit status, what the bucket records, how often the command ran)."""
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
        ([2], 2, 1),  # a user's mistake
        ([1, 143, 1, 143, 0], 0, 5),  # a preemption is not a failure
        ([1, 134, 1], 1, 3),
        ([75, 143, 75, 143, 75, 0], 0, 6),  # stalled or preempted
        (["1+", "1+", 1, "134+", 1, 1, 134], 134, 7),  # a new checkpoint resets the count of failures
    ],
)
def test_a_host_retries_and_records_the_final_status(host, statuses, ended, runs):
    assert host(statuses) == (ended, f"gs://my-bucket/me/ended/first-light {ended}\n", runs)


@pytest.mark.parametrize(("worker", "slice_id"), [(3, ""), (0, "1"), (0, "10")])
def test_other_hosts_record_only_failures(host, worker, slice_id):
    assert host([0], worker, slice_id) == (0, "", 1)
    assert host([2], worker, slice_id) == (2, "gs://my-bucket/me/ended/first-light 2\n", 2)


def test_the_first_host_of_the_first_slice_records_success(host):
    assert host([0], worker=0, slice_id="0")[1] == "gs://my-bucket/me/ended/first-light 0\n"


def test_a_host_runs_the_command_unchanged(host, tmp_path):
    host([0])
    expected = [*COMMAND[:-1], f"{tmp_path}/mnt/me/runs/first-light"]
    assert (tmp_path / "arguments").read_text().split("\0")[:-1] == expected
    values = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    assert values == {
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
trap 'touch terminated; exit 143' TERM
while true; do /bin/sleep 0.1; done
"""
DELETED = "compute tpus queued-resources delete first-light --force --quiet --zone=us-east5-a\n"


def test_the_first_host_deletes_the_slices(host, tmp_path):
    host([0])
    assert (tmp_path / "deleted").read_text() == DELETED
    assert "the run has ended with status 0" in (tmp_path / "sent.log").read_text()


def test_other_hosts_delete_nothing(host, tmp_path):
    host([0], worker=3)
    assert not (tmp_path / "deleted").exists()


def test_a_host_that_may_not_delete_logs_that_and_ends(host, tmp_path):
    (tmp_path / "kept").touch()
    assert host([2])[0] == 2
    assert "its service account needs roles/tpu.admin" in (tmp_path / "sent.log").read_text()


def test_a_host_that_boots_after_the_end_deletes_the_slices(host, tmp_path):
    host([0])
    (tmp_path / "before").write_text("0\n")
    assert host([1])[2] == 1, "the command must not run again"
    assert (tmp_path / "deleted").read_text() == 2 * DELETED


def test_slices_end_at_their_longest_life(host, tmp_path):
    """The command receives SIGTERM when its time is over."""
    script = (tmp_path / "startup.sh").read_text()
    assert "left=$((604800 - SECONDS))\n  if [ $left -lt 60 ]" in script
    (tmp_path / "startup.sh").write_text(script.replace("604800", "2").replace("-lt 60", "-lt 1"))
    program(tmp_path / "host", "twinstack", HOST["twinstack"].replace('exit "$status"', WAITING))
    assert host([0])[:2] == (124, "gs://my-bucket/me/ended/first-light 124\n")
    assert (tmp_path / "terminated").exists() and (tmp_path / "deleted").read_text() == DELETED
