"""A job as a queued resource of Cloud TPU, by plain `gcloud` (cloud.google.com/tpu/docs/queued-resources).

Two scripts. Every host runs `startup.sh` when it boots: it mounts the bucket, installs the commit, runs the command,
tries again after a failure, copies its log to the bucket, leaves the status that the run ended with there, and gives
the slices back, at the latest when they are so many hours old: the API has a longest life for flex-start alone.
`launch.sh` runs where a person is: it asks for the slices, asks again after a preemption, and gives back what the hosts
may not, whose service account then lacks the role `roles/tpu.admin`.
"""

import shlex
from pathlib import Path

from common.files import write_atomically
from experiments.launching.job import AGAIN, BUNDLE, LOCAL, MAX_FAILURES, MOUNT, USER_ERROR, Job
from experiments.launching.slices import RENTED, accelerator_type

PROGRAMS = ("bash", "gcloud")
STARTUP, LAUNCH, ASKED = "startup.sh", "launch.sh", "asked"
HOURS = 168
"""The hours that slices live at most, by default."""
TIMED_OUT = 124
"""Status of a run whose slices reached their longest life; `timeout`'s own."""

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
  # A checkpoint is finished by renaming its folder; a bucket without folders of its own does that file by file.
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
# Status 0 counts on the first host alone: others may be done while it still writes results.
first_host() {{
  [ "$(metadata attributes/agent-worker-number)" = 0 ] &&
    ! metadata attributes/tpu-env | grep "^MEGASCALE_SLICE_ID: '[^0]" >/dev/null
}}
again() {{ for _ in $(seq 20); do if "$@"; then return; fi; sleep 30; done; return 1; }}
tell() {{ echo "$1" | gcloud storage cp - {ended_url}; }}
give_back() {{
  local zone
  zone=$(metadata zone)
  {delete} --zone="${{zone##*/}}"
}}
end() {{
  echo "the run has ended with status $1; the slices are given back"
  again tell "$1" || true
  again send_log >/dev/null 2>&1 || true
  if ! again give_back; then
    echo "the slices could not be given back from here: the service account needs roles/tpu.admin; {launch} does it too"
    send_log >/dev/null 2>&1 || true
  fi
  exit "$1"
}}

if [ -n "$(gcloud storage cat {ended_url} 2>/dev/null)" ]; then again give_back || true; exit 0; fi
failures=0
while true; do
  left=$(({life} - SECONDS))
  if [ $left -lt 60 ]; then end {timed_out}; fi
  status=0
  timeout --kill-after=600 $left bash "$0" job || status=$?
  case $status in
    0) if first_host; then end 0; fi; again send_log >/dev/null 2>&1 || true; exit 0 ;;
    {user_error} | {timed_out}) end $status ;;
    {statuses}) failures=0 ;;
    *) failures=$((failures + 1)); if [ $failures -ge {max_failures} ]; then end $status; fi ;;
  esac
  echo "status $status: the command is run again"
  sleep 30
done
"""

_LAUNCH = """\
#!/usr/bin/env bash
# Where this is stopped a run goes on, but is not asked for again; started anew, this goes on watching.
set -euo pipefail
cd "$(dirname "$0")"
create() {{ {create}; }}
state() {{ {state} 2>/dev/null || true; }}
delete() {{ {delete}; }}
gone() {{ grep -qiE 'not.?found' <<<"$({state} 2>&1 || true)"; }}
ended() {{ gcloud storage cat {ended_url} 2>/dev/null || true; }}

if [ ! -e {asked} ] && [ -z "$(state)" ]; then
  gcloud storage cp {bundle} {bundle_url}
  gcloud storage rm {ended_url} 2>/dev/null || true
  create
fi
touch {asked}
while status=$(ended); [ -z "$status" ]; do
  sleep 60
  case "$(state)" in
    SUSPENDED | FAILED) delete || true ;; # preempted
    # Deleted by the line above a minute ago, or by a host that has just ended the run.
    '') [ -n "$(ended)" ] || create || true ;;
  esac
done
until delete || gone; do sleep 60; done # hosts may have done so
rm {asked}
echo {run} has ended with status "$status", logs are in {logs_url}
[ "$status" != {timed_out} ] || echo the slices reached their longest life: launched again, the run goes on
exit "$status"
"""


def startup_script(job: Job) -> str:
    """What each host runs as root when it boots."""
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
        statuses=" | ".join(map(str, AGAIN)),
        max_failures=MAX_FAILURES,
    )


def hours(job: Job) -> int:
    """The hours after which slices end by themselves."""
    return HOURS if job.hours is None else job.hours


def launch_script(job: Job) -> str:
    """What stays with a person, or on a machine that is always on."""
    return _LAUNCH.format(
        create=shlex.join(create(job)),
        state=shlex.join([*_RESOURCES, "describe", job.run, *_zone(job), "--format=value(state.state)"]),
        delete=shlex.join(delete(job)),
        ended_url=job.bucket.url("ended", job.run),
        bundle=BUNDLE,
        bundle_url=job.bundle_url,
        logs_url=job.bucket.url("logs", job.run),
        asked=ASKED,
        timed_out=TIMED_OUT,
        run=job.run,
    )


def create(job: Job) -> list[str]:
    """The request for all slices, to be made in the folder of `startup.sh`."""
    several = [f"--node-count={job.topology.slices}", f"--node-prefix={job.run}"]
    return [
        *_RESOURCES,
        "create",
        job.run,
        *_zone(job),
        f"--accelerator-type={accelerator_type(job.topology)}",
        f"--runtime-version={RENTED[job.topology.chip].runtime}",
        *([f"--node-id={job.run}"] if job.topology.slices == 1 else several),
        *(["--spot"] if job.spot else []),
        "--scopes=https://www.googleapis.com/auth/cloud-platform",  # a bucket, and themselves to delete
        f"--metadata-from-file=startup-script={STARTUP}",
    ]


def delete(job: Job) -> list[str]:
    """Gives the slices back, whatever they do."""
    return [*_RESOURCES, "delete", job.run, *_zone(job), "--force", "--quiet"]


def write(job: Job, folder: Path) -> list[list[str]]:
    """Writes both scripts; returns the commands that launch, where the bundle lies in `folder` too."""
    write_atomically(folder / STARTUP, startup_script(job).encode())
    write_atomically(folder / LAUNCH, launch_script(job).encode())
    (folder / ASKED).unlink(missing_ok=True)  # a launch anew, not a watch that goes on
    return [["bash", str(folder / LAUNCH)]]


def afterwards(job: Job) -> dict[str, str]:
    """Commands for later, and what each is for."""
    node = job.run if job.topology.slices == 1 else f"{job.run}-0"
    log = f"--command=sudo tail --lines=1000 --follow=name {LOCAL}/*.log"
    return {
        f"{LAUNCH} asks by": shlex.join(create(job)),
        "state": shlex.join([*_RESOURCES, "describe", job.run, *_zone(job)]),
        "watch": shlex.join(["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *_zone(job), "--worker=0", log]),
        "logs": shlex.join(["gcloud", "storage", "ls", job.bucket.url("logs", job.run)]),
        "stop": shlex.join(delete(job)),
    }


def _zone(job: Job) -> list[str]:
    return [] if job.zone is None else [f"--zone={job.zone}"]
