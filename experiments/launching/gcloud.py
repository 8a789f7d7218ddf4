"""A job as a queued resource of Cloud TPU, by plain `gcloud` (cloud.google.com/tpu/docs/queued-resources).

Two scripts. Every host runs `startup.sh` when it boots: it mounts the bucket, installs the commit, runs the command,
tries again after a failure, and leaves the status that the run ended with in the bucket. `launch.sh` runs where a
person is: it asks for the slices, asks again after a preemption, and gives them back when the run has ended.
"""

import shlex
from pathlib import Path

from common.files import write_atomically
from common.train.preemption import Preempted
from experiments.launching.job import BUNDLE, MAX_FAILURES, MOUNT, Job
from experiments.launching.slices import RENTED, accelerator_type

PROGRAMS = ("bash", "gcloud")
STARTUP, LAUNCH = "startup.sh", "launch.sh"
USER_ERROR = 2
"""Status of a mistake that trying again does not mend."""

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

attribute() {{
  curl --silent --fail --header 'Metadata-Flavor: Google' \\
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}}
# Status 0 counts on the first host alone: others may be done while it still writes results.
first_host() {{
  [ "$(attribute agent-worker-number)" = 0 ] && ! attribute tpu-env | grep "^MEGASCALE_SLICE_ID: '[^0]" >/dev/null
}}
end() {{
  until echo "$1" | gcloud storage cp - {ended_url}; do sleep 30; done
  exit "$1"
}}

failures=0
while true; do
  status=0
  bash "$0" job || status=$?
  case $status in
    0) if first_host; then end 0; fi; exit 0 ;;
    {user_error}) end {user_error} ;;
    {preempted}) ;;
    *) failures=$((failures + 1)); if [ $failures -ge {max_failures} ]; then end $status; fi ;;
  esac
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
ended() {{ gcloud storage cat {ended_url} 2>/dev/null || true; }}

if [ -z "$(state)" ]; then
  gcloud storage cp {bundle} {bundle_url}
  gcloud storage rm {ended_url} 2>/dev/null || true
  create
fi
while status=$(ended); [ -z "$status" ]; do
  sleep 60
  case "$(state)" in
    SUSPENDED | FAILED) delete || true ;; # preempted
    '') create || true ;; # deleted by the line above, a minute ago
  esac
done
until delete; do sleep 60; done
echo {run} has ended with status "$status"
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
        bucket=job.bucket.name,
        mount=MOUNT,
        user_error=USER_ERROR,
        preempted=Preempted(0).code,
        max_failures=MAX_FAILURES,
    )


def launch_script(job: Job) -> str:
    """What stays with a person, or on a machine that is always on."""
    return _LAUNCH.format(
        create=shlex.join(create(job)),
        state=shlex.join([*_RESOURCES, "describe", job.run, *_zone(job), "--format=value(state.state)"]),
        delete=shlex.join(delete(job)),
        ended_url=job.bucket.url("ended", job.run),
        bundle=BUNDLE,
        bundle_url=job.bundle_url,
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
        f"--metadata-from-file=startup-script={STARTUP}",
    ]


def delete(job: Job) -> list[str]:
    """Gives the slices back, whatever they do."""
    return [*_RESOURCES, "delete", job.run, *_zone(job), "--force", "--quiet"]


def write(job: Job, folder: Path) -> list[list[str]]:
    """Writes both scripts; returns the commands that launch, where the bundle lies in `folder` too."""
    write_atomically(folder / STARTUP, startup_script(job).encode())
    write_atomically(folder / LAUNCH, launch_script(job).encode())
    return [["bash", str(folder / LAUNCH)]]


def afterwards(job: Job) -> dict[str, str]:
    """Commands for later, and what each is for."""
    node = job.run if job.topology.slices == 1 else f"{job.run}-0"
    log = "--command=sudo journalctl --follow --unit=google-startup-scripts"
    return {
        f"{LAUNCH} asks by": shlex.join(create(job)),
        "state": shlex.join([*_RESOURCES, "describe", job.run, *_zone(job)]),
        "watch": shlex.join(["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *_zone(job), "--worker=0", log]),
        "stop": shlex.join(delete(job)),
    }


def _zone(job: Job) -> list[str]:
    return [] if job.zone is None else [f"--zone={job.zone}"]
