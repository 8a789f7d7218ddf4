"""Joining the processes of one job: from flags, or from what Cloud TPU, GKE, SLURM and Open MPI tell their processes.

Where one of them is lost the others stop, since none can go on without it; they leave the checkpoints as they are.
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
"""A process that has not been heard of for so long is lost."""
SHUTDOWN_SECONDS = 30
"""How long a process that has ended waits for the others to end."""
START_SECONDS = 300
COLLECTIVES = ("Gloo", "NCCL")
"""Words in the errors of collectives whose other side has gone."""


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Iterator[None]:
    """Within, this process is one of its job's; it must be entered before anything asks JAX for devices.

    With all three given it is process `process` of `processes`, of which number 0 listens at `coordinator` (HOST:PORT);
    with `processes=1` it is alone. With none it is what the environment says, and alone where that says nothing: then
    nothing is waited for or contacted. Raises UserError for anything else, and where the others cannot be reached.

    Where another process is lost, this one is ended within `HEARTBEAT_SECONDS` and little more, and the last line on
    its standard error says which one it was, where that can be known.
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
            # Whoever watches over the job ends this process as soon as it knows who is lost.
            print(f"twinstack: the exchange with the other processes broke off ({error})", file=sys.stderr, flush=True)
            time.sleep(HEARTBEAT_SECONDS + SHUTDOWN_SECONDS)
        raise
    # After an error the end of the process does this: it waits for the others, and until then nothing would be printed.
    jax.distributed.shutdown()


def _from_flags(coordinator: str | None, processes: int | None, process: int | None) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; empty: alone; None: nothing was given."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if all(value is None for value in given.values()):
        return None
    if processes is not None and processes < 1:
        raise UserError(f"--processes is {processes}: it must be 1 or more")
    if processes == 1:
        if process not in (None, 0):
            raise UserError(f"--process is {process}; of one process it is 0")
        return {}
    if missing := [flag for flag, value in given.items() if value is None]:
        raise UserError(
            f"several processes need {', '.join(missing)} too: --coordinator HOST:PORT (of process 0), "
            "--processes N and --process I, which is 0 to N-1"
        )
    assert coordinator is not None and processes is not None and process is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator {coordinator!r} must be HOST:PORT, such as 10.0.0.1:8476")
    if not 0 <= process < processes:
        raise UserError(f"--process is {process}: of {processes} processes it is 0 to {processes - 1}")
    return {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}


def _several(environment: Mapping[str, str]) -> bool:
    """Whether this process was started as one of several, by the variables that `jax.distributed` goes by.

    On a Cloud TPU machine that GKE has not started only its metadata server knows; JAX asks it.

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
                "this pod is one of an indexed Job, and the package `kubernetes`, by which JAX finds the others, is "
                "not installed: pip install kubernetes, or give --coordinator, --processes and --process"
            )
        return True
    return _on_cloud_tpu(environment)


def _on_cloud_tpu(environment: Mapping[str, str]) -> bool:
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
    """Passes standard error through `common.train.lost`, which has the last word where this process is ended.

    JAX ends it from a thread of its own, at once; nothing of ours could say anything any more.
    """
    sys.stderr.flush()
    lost = Path(__file__).with_name("lost.py")
    watcher = subprocess.Popen([sys.executable, "-I", str(lost)], stdin=subprocess.PIPE, start_new_session=True)
    assert watcher.stdin is not None
    os.dup2(watcher.stdin.fileno(), 2)
    watcher.stdin.close()
