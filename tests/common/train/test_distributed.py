"""Joining the processes of a job by environment or flags, and the reading of JAX's last messages."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.train import distributed
from common.train.distributed import _from_flags, _several, joined
from common.train.lost import verdict

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
LOST = Path(distributed.__file__).with_name("lost.py")


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # a shell of salloc: no task of a step
        ({**SLURM, "SLURM_NTASKS": "4"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_the_environment_says_whether_there_are_several(
    environment: dict[str, str], several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed.Path, "exists", lambda path: False)  # no TPU here
    assert _several(environment) is several


def test_a_pod_of_an_indexed_job_needs_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install kubernetes, or give --coordinator"):
        _several(POD)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert _several(POD)


@pytest.mark.parametrize(
    ("platforms", "skip", "libtpu", "chips", "asked"),
    [
        (None, False, True, True, True),
        ("tpu,cpu", False, True, True, True),
        ("cpu", False, True, True, False),
        (None, True, True, True, False),
        (None, False, False, True, False),
        (None, False, True, False, False),
    ],
)
def test_only_a_cloud_tpu_machine_asks_its_metadata_server(
    platforms: str | None, skip: bool, libtpu: bool, chips: bool, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if libtpu else None)
    monkeypatch.setattr(distributed.Path, "exists", lambda path: chips)
    environment = {"JAX_PLATFORMS": platforms} if platforms else {}
    environment |= {"TPU_SKIP_MDS_QUERY": "1"} if skip else {}
    assert _several(environment) is asked


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("h:1", None, None), "need --processes, --process too"),
        ((None, 2, 0), "need --coordinator too"),
        ((None, None, 0), "need --coordinator, --processes too"),
        (("h:1", 2, 2), "--process is 2: with 2 processes it is 0 to 1"),
        (("h:1", 2, -1), "--process is -1"),
        (("h:1", 0, 0), "--processes is 0: it must be 1 or more"),
        (("h:1", 1, 1), "with one process it is 0"),
        *(((address, 2, 0), "must be HOST:PORT") for address in ("h", "h:", ":1", "h:x", "h:0", "h:65536")),
    ],
)
def test_wrong_flags_are_one_line(given: tuple[str | None, int | None, int | None], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised, joined(*given):
        raise AssertionError
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("address", ["10.0.0.1:8476", "[::1]:8476", "host.domain:1"])
def test_flags_become_what_jax_is_given(address: str) -> None:
    expected = {"coordinator_address": address, "num_processes": 4, "process_id": 3}
    assert _from_flags(address, 4, 3) == expected
    assert _from_flags(None, 1, None) == _from_flags(address, 1, 0) == {}
    assert _from_flags(None, None, None) is None


@pytest.mark.parametrize("processes", [None, 1])
def test_one_process_joins_nobody(processes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.distributed.initialize", None)
    monkeypatch.setattr(subprocess, "Popen", None)
    with joined(None, processes, None):
        pass


# --- JAX's last words, as jaxlib 0.10.2 wrote them; the service's own lines come before the fatal one.

SERVICE = "E1123 19:39:34.066563 27058 coordination_service.cc:1549] Use error polling to propagate the following error"
FATAL = (
    "F1123 19:39:34.068091 27069 client.h:80] Terminating process because the JAX distributed service detected fatal "
    "errors. This most likely indicates that another task died; absl::Status: "
)
SILENT = (
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\nThe tasks have crashed. Check "
    "the task logs for an earlier error, or scheduler events to debug further.\n\nRPC: /xla/PollForError\n"
)
STACK = "*** Check failure stack trace: ***\n    @     0x7f8494140634  absl::lts_20260107::LogMessage::SendToLog()\n"
LEADER = "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted/died\n"
EARLY = (
    "INTERNAL: Shutdown barrier has failed.\nBarrier result: 'DEADLINE_EXCEEDED: Barrier timed out.\n# of tasks that "
    "reached the barrier: 1/2.\nThe first task at the barrier: 1. Some timed out task names:\n0\n"
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FATAL + SILENT.format("1") + STACK, "process 1 was lost"),
        (FATAL + SILENT.format("1\n12") + STACK, "processes 1, 12 were lost"),
        (FATAL + SILENT.format("/job:jax_worker/replica:0/task:3") + STACK, "process 3 was lost"),
        (FATAL + LEADER + STACK, "process 0, or the connection to it, was lost"),
        (FATAL + EARLY + STACK, "process 1 ended before the others"),
        (FATAL + "INTERNAL: something new\n" + STACK, "another process was lost"),
        (SERVICE + SILENT.format("1"), None),
        ("twinstack: error: train.mesh\n", None),
        ("", None),
    ],
)
def test_the_last_words_say_who_was_lost(text: str, said: str | None) -> None:
    assert verdict(text) == said
    assert verdict("a line before\n" + text) == said


def test_standard_error_passes_through_and_the_verdict_comes_last() -> None:
    """Bytes that are not UTF-8 pass too, and nothing is added if no process was lost."""
    words = b"one \xff line\n"
    for fatal in (b"", (FATAL + SILENT.format(1)).encode()):
        command = [sys.executable, "-I", str(LOST)]
        found = subprocess.run(command, input=words + fatal, capture_output=True, timeout=60)
        assert found.returncode == 0 and found.stdout == b""
        lines = found.stderr.decode().splitlines()
        assert lines[0].startswith("one ") and lines[0].endswith(" line")
        assert ("process 1 was lost" in lines[-1]) == bool(fatal)
        assert len(lines) == 1 + (fatal.count(b"\n") + 1 if fatal else 0)
