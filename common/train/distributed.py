"""Joins the processes of one job, by flags or by the environment that Cloud TPU, GKE, SLURM and Open MPI set up.

If a process is lost the others stop, since none can continue without it; checkpoints stay as they are.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from common.errors import UserError

HEARTBEAT_SECONDS = 60
"""A process without a heartbeat for this long counts as lost."""
SHUTDOWN_SECONDS = 30
"""How long a finished process waits for the others to finish."""
START_SECONDS = 300
"""How long to wait for the other processes to join."""
COLLECTIVES = ("Gloo", "NCCL")
"""Words in the errors of collectives that lost another process."""


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Iterator[None]:
    """Makes this process one of its job's while the context lasts; enter it before anything asks JAX for devices.

    With all three arguments, this is process `process` of `processes`, and process 0 listens at `coordinator`
    (HOST:PORT). With `processes=1` it is alone. With none the environment decides, and if it names no job the process
    is alone; a process that is alone contacts nobody and waits for nobody. Raises UserError for any other combination,
    and if the other processes cannot be reached.

    If another process is lost, this one is ended shortly after `HEARTBEAT_SECONDS`, and the last line on its standard
    error says which one was lost, as far as JAX knows.
    """
    given = _from_flags(coordinator, processes, process)
    if given == {} or (given is None and not _several(os.environ)):
        yield
        return
    _watch_standard_error()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **(given or {}),
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the processes of this job cannot be joined ({error}): {_advice(given)}") from None
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if any(word in str(error) for word in COLLECTIVES):
            # JAX ends this process as soon as it knows which one is lost, and then `lost.py` reports it.
            print(f"twinstack: lost the connection to the other processes ({error})", file=sys.stderr, flush=True)
            time.sleep(HEARTBEAT_SECONDS + SHUTDOWN_SECONDS)
        raise
    # Not after an error: this waits for the other processes, and the error would be printed only then.
    jax.distributed.shutdown()


def _from_flags(coordinator: str | None, processes: int | None, process: int | None) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`; empty for one process, None without any flags."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if all(value is None for value in given.values()):
        return None
    if processes is not None and processes < 1:
        raise UserError(f"--processes is {processes}: it must be 1 or more")
    if processes == 1:
        if process not in (None, 0):
            raise UserError(f"--process is {process}: with one process it is 0")
        return {}
    if missing := [flag for flag, value in given.items() if value is None]:
        raise UserError(
            f"several processes need {', '.join(missing)} too: --coordinator HOST:PORT (where process 0 listens), "
            "--processes N and --process I, which is 0 to N-1"
        )
    assert coordinator is not None and processes is not None and process is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator {coordinator!r} must be HOST:PORT, such as 10.0.0.1:8476")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process}: with {processes} processes it is 0 to {processes - 1}")
    return {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}


def _several(environment: Mapping[str, str]) -> bool:
    """Returns whether this process was started as one of several, by the variables that `jax.distributed` reads.

    On a Cloud TPU machine outside GKE only the metadata server knows, and JAX asks it; then this returns True.

    >>> _several({"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"})
    True
    >>> _several({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9", "OMPI_COMM_WORLD_SIZE": "1"})
    False
    >>> _several({"TPU_WORKER_HOSTNAMES": "host-0,host-1"})
    True
    """
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= set(environment):
        return int(environment.get("SLURM_NTASKS", 1)) > 1
    if int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1:
        return True
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:
        return "," in workers
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError(
                "this pod belongs to an indexed Job, and the package `kubernetes`, with which JAX finds the others, is "
                "not installed: pip install kubernetes, or give --coordinator, --processes and --process"
            )
        return True
    return _on_cloud_tpu(environment)


def _on_cloud_tpu(environment: Mapping[str, str]) -> bool:
    """Returns whether JAX will use a Cloud TPU and may ask the machine's metadata server."""
    platforms = environment.get("JAX_PLATFORMS") or "tpu"
    if "tpu" not in platforms.split(",") or "TPU_SKIP_MDS_QUERY" in environment:
        return False
    chips = any(Path(chip).exists() for chip in ("/dev/accel0", "/dev/vfio/0"))
    return chips and importlib.util.find_spec("libtpu") is not None


def _advice(given: dict[str, Any] | None) -> str:
    if given is None:
        return "give --coordinator, --processes and --process, or --processes 1 for this machine alone"
    return f"does process 0 run, and can {given['coordinator_address']} be reached from here?"


def _watch_standard_error() -> None:
    """Pipes standard error through `common.train.lost`, which can still report when this process has been ended.

    When another process is lost, JAX ends this one from a thread, at once, and no Python code here runs any more.
    """
    sys.stderr.flush()
    lost = Path(__file__).with_name("lost.py")
    watcher = subprocess.Popen([sys.executable, "-I", str(lost)], stdin=subprocess.PIPE, start_new_session=True)
    assert watcher.stdin is not None
    os.dup2(watcher.stdin.fileno(), 2)
    watcher.stdin.close()
