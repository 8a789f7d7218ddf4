"""A job as a queued resource of Cloud TPU, by plain `gcloud` (cloud.google.com/tpu/docs/queued-resources).

Two scripts do the work. Every host runs `startup.sh` when it boots: it mounts the bucket, installs the commit, runs the
command, retries after a failure, copies its log to the bucket, records the run's exit status there, and deletes the
slices. It deletes them after `hours` at the latest, since the API limits the life of flex-start requests only.
`launch.sh` runs on the user's machine: it requests the slices, requests them again after a preemption, and deletes them
in case the hosts cannot, because their service account lacks the role `roles/tpu.admin`.
"""

import shlex
from pathlib import Path

from common.files import write_atomically
from experiments.launching.job import BUNDLE, LOCAL, MAX_FAILURES, MOUNT, RELAUNCH, USER_ERROR, Job
from experiments.launching.slices import RENTED, accelerator_type

PROGRAMS = ("bash", "gcloud")
STARTUP, LAUNCH, REQUESTED = "startup.sh", "launch.sh", "asked"
"""Files in the launch folder. `REQUESTED` exists while a request is being watched."""
HOURS = 168
"""Default of the slices' longest life."""
TIMED_OUT = 124
"""Exit status of a run whose slices reached their longest life; the same as `timeout`'s."""

_RESOURCES = ["gcloud", "compute", "tpus", "queued-resources"]

_STARTUP = """\
#!/usr/bin/env bash
set -euo pipefail
{exports}
if [ "${{1-}}" = job ]; then
  if ! command -v gcsfuse >/dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl --silent --show-error --fail https://packages.cloud.google.com/apt/doc/apt-key.gpg >"$key"
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release --codename --short) main" \\
      >/etc/apt/sources.list.d/gcsfuse.list
    apt-get update
    apt-get install --yes gcsfuse
  fi
  mkdir -p {mount}
  # A finished checkpoint's folder is renamed; a bucket without hierarchical namespace does that file by file.
  mountpoint --quiet {mount} || gcsfuse --implicit-dirs --rename-dir-limit=10000 {bucket} {mount}
{job}
fi

log={local}/$(hostname).log
mkdir -p {local}
exec >>"$log" 2>&1
send_log() {{ gcloud storage cp "$log" {logs_url}/; }}
while sleep 300; do send_log; done >/dev/null 2>&1 &
trap "kill $! 2>/dev/null || true" EXIT

metadata() {{
  curl --silent --fail --header 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/instance/$1"
}}
# Status 0 counts on the first host only: the others may finish while it still writes results.
first_host() {{
  [ "$(metadata attributes/agent-worker-number)" = 0 ] &&
    ! metadata attributes/tpu-env | grep "^MEGASCALE_SLICE_ID: '[^0]" >/dev/null
}}
retry() {{ for _ in $(seq 20); do if "$@"; then return; fi; sleep 30; done; return 1; }}
record() {{ echo "$1" | gcloud storage cp - {ended_url}; }}
delete_slices() {{
  local zone
  zone=$(metadata zone)
  {delete} --zone="${{zone##*/}}"
}}
end() {{
  echo "the run has ended with status $1; deleting the slices"
  retry record "$1" || true
  retry send_log >/dev/null 2>&1 || true
  if ! retry delete_slices; then
    echo "this host may not delete the slices: its service account needs roles/tpu.admin; {launch} deletes them too"
    send_log >/dev/null 2>&1 || true
  fi
  exit "$1"
}}

if [ -n "$(gcloud storage cat {ended_url} 2>/dev/null)" ]; then retry delete_slices || true; exit 0; fi
failures=0
while true; do
  left=$(({life} - SECONDS))
  if [ $left -lt 60 ]; then end {timed_out}; fi
  status=0
  timeout --kill-after=600 $left bash "$0" job || status=$?
  case $status in
    0) if first_host; then end 0; fi; retry send_log >/dev/null 2>&1 || true; exit 0 ;;
    {user_error} | {timed_out}) end $status ;;
    {statuses}) failures=0 ;;
    *) failures=$((failures + 1)); if [ $failures -ge {max_failures} ]; then end $status; fi ;;
  esac
  echo "status $status: running the command again"
  sleep 30
done
"""

_LAUNCH = """\
#!/usr/bin/env bash
# If this script is stopped, the run continues, but slices are not requested again. Started again, it resumes watching.
set -euo pipefail
cd "$(dirname "$0")"
create() {{ {create}; }}
state() {{ {state} 2>/dev/null || true; }}
delete() {{ {delete}; }}
gone() {{ grep -qiE 'not.?found' <<<"$({state} 2>&1 || true)"; }}
ended() {{ gcloud storage cat {ended_url} 2>/dev/null || true; }}

if [ ! -e {requested} ] && [ -z "$(state)" ]; then
  gcloud storage cp {bundle} {bundle_url}
  gcloud storage rm {ended_url} 2>/dev/null || true
  create
fi
touch {requested}
while status=$(ended); [ -z "$status" ]; do
  sleep 60
  case "$(state)" in
    SUSPENDED | FAILED) delete || true ;; # preempted
    # Deleted a minute ago by the line above, or by a host that has just ended the run.
    '') [ -n "$(ended)" ] || create || true ;;
  esac
done
until delete || gone; do sleep 60; done # hosts may have deleted them
rm {requested}
echo {run} has ended with status "$status", logs are in {logs_url}
[ "$status" != {timed_out} ] || echo the slices reached their longest life: launch again to resume the run
exit "$status"
"""


def startup_script(job: Job) -> str:
    """The script that each host runs as root when it boots."""
    return _STARTUP.format(
        exports="\n".join(
            f"export {name}={shlex.quote(value)}" for name, value in {"HOME": "/root", **job.environment()}.items()
        ),
        job="\n".join(f"  {line}" for line in ["cd /", *job.setup(), *job.main()]),
        ended_url=job.bucket.url("ended", job.run),
        logs_url=job.bucket.url("logs", job.run),
        bucket=job.bucket.name,
        mount=MOUNT,
        local=LOCAL,
        delete=shlex.join([*_RESOURCES, "delete", job.run, "--force", "--quiet"]),
        launch=LAUNCH,
        life=hours(job) * 3600,
        timed_out=TIMED_OUT,
        user_error=USER_ERROR,
        statuses=" | ".join(map(str, RELAUNCH)),
        max_failures=MAX_FAILURES,
    )


def hours(job: Job) -> int:
    """The slices' longest life."""
    return HOURS if job.hours is None else job.hours


def launch_script(job: Job) -> str:
    """The script that requests and watches the slices, for the user's machine or one that is always on."""
    return _LAUNCH.format(
        create=shlex.join(create(job)),
        state=shlex.join([*_RESOURCES, "describe", job.run, *_zone(job), "--format=value(state.state)"]),
        delete=shlex.join(delete(job)),
        ended_url=job.bucket.url("ended", job.run),
        bundle=BUNDLE,
        bundle_url=job.bundle_url,
        logs_url=job.bucket.url("logs", job.run),
        requested=REQUESTED,
        timed_out=TIMED_OUT,
        run=job.run,
    )


def create(job: Job) -> list[str]:
    """The command that requests all slices; it must run in the folder of `startup.sh`."""
    several = [f"--node-count={job.slices.slices}", f"--node-prefix={job.run}"]
    return [
        *_RESOURCES,
        "create",
        job.run,
        *_zone(job),
        f"--accelerator-type={accelerator_type(job.slices)}",
        f"--runtime-version={RENTED[job.slices.chip].runtime}",
        *([f"--node-id={job.run}"] if job.slices.slices == 1 else several),
        *(["--spot"] if job.spot else []),
        "--scopes=https://www.googleapis.com/auth/cloud-platform",  # to use the bucket and to delete themselves
        f"--metadata-from-file=startup-script={STARTUP}",
    ]


def delete(job: Job) -> list[str]:
    """The command that deletes the slices, whatever their state."""
    return [*_RESOURCES, "delete", job.run, *_zone(job), "--force", "--quiet"]


def write(job: Job, folder: Path) -> list[list[str]]:
    """Writes both scripts; returns the commands that launch the job, with the bundle in `folder` too."""
    write_atomically(folder / STARTUP, startup_script(job).encode())
    write_atomically(folder / LAUNCH, launch_script(job).encode())
    (folder / REQUESTED).unlink(missing_ok=True)  # a new launch, not a resumed watch
    return [["bash", str(folder / LAUNCH)]]


def afterwards(job: Job) -> dict[str, str]:
    """Commands for later, by purpose."""
    node = job.run if job.slices.slices == 1 else f"{job.run}-0"
    log = f"--command=sudo tail --lines=1000 --follow=name {LOCAL}/*.log"
    return {
        f"{LAUNCH} requests by": shlex.join(create(job)),
        "state": shlex.join([*_RESOURCES, "describe", job.run, *_zone(job)]),
        "watch": shlex.join(["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *_zone(job), "--worker=0", log]),
        "logs": shlex.join(["gcloud", "storage", "ls", job.bucket.url("logs", job.run)]),
        "stop": shlex.join(delete(job)),
    }


def _zone(job: Job) -> list[str]:
    return [] if job.zone is None else [f"--zone={job.zone}"]
