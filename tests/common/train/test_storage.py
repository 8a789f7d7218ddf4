"""Storage that refuses for a while or for too long: no good checkpoint is lost."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from common.errors import UserError
from common.train import storage
from common.train.checkpoints import Checkpoints, Progress
from common.train.config import Patience
from common.train.run_files import RunFiles
from common.train.state import TrainState
from common.train.storage import Backoff, patiently, refusal

ROOT = Path(__file__).parents[3]
NEVER, FOREVER = "0", "1000"
BUCKET = ValueError("UNAVAILABLE: Error reading gs://bucket/run: HTTP response code: 503")


class Gone(Exception):
    """An error as clients of buckets raise it."""

    code = 503


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(5, "Input/output error"), True),
        (ConnectionResetError("reset by peer"), True),
        (BUCKET, True),
        (ValueError("OUT_OF_RANGE: Failed to write 184 bytes: File too large [os_error_code='27']"), True),
        (Gone("service unavailable"), True),
        (FileNotFoundError(2, "No such file"), False),
        (ValueError("NOT_FOUND: Error opening file [os_error_code='2']"), False),
        (ValueError("DATA_LOSS: checksum mismatch in checkpoint 503"), False),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes"), False),
        (ValueError("its arrays are not those that were saved"), False),
    ],
)
def test_refusals_that_waiting_may_cure(error: Exception, refused: bool) -> None:
    assert (refusal(error) is not None) == refused
    outer = RuntimeError("a save failed")
    outer.__cause__ = error
    assert (refusal(outer) is not None) == refused


def test_pauses_double_up_to_a_minute_and_end_with_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(storage.time, "monotonic", lambda: now)
    backoff, pauses = Backoff(200.0), []
    while (pause := backoff.pause()) is not None:
        pauses.append(pause)
        now += pause
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 17.0]
    assert backoff.refused_seconds == sum(pauses) == 200.0
    backoff.reset()
    assert backoff.pause() == 1.0


def test_other_errors_are_not_waited_for() -> None:
    def broken() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        patiently(broken, "x", patience_seconds=1e9, note=pytest.fail, advice="")


# --- Real refusals, by the operating system


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("xla")


def train(cache: Path, run_dir: Path, *arguments: str) -> tuple[int, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, "-m", "tests.common.train.full_disk", str(run_dir), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def unbroken(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unbroken")
    assert train(cache, path, "0", "0", NEVER, "600") == (0, "")
    return path


def check_same(found: Path, expected: Path) -> None:
    assert (found / RunFiles.METRICS).read_bytes() == (expected / RunFiles.METRICS).read_bytes()
    with np.load(found / "params.npz") as a, np.load(expected / "params.npz") as b:
        assert len(a.files) == len(b.files) > 0
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


LIMITS = pytest.mark.parametrize(
    ("limit_bytes", "said"),
    [
        pytest.param("6000", "a checkpoint could not be written", id="checkpoints"),
        pytest.param("1500", "rows of metrics: refused", id="rows"),
    ],
)


@pytest.mark.slow  # processes that wait
@LIMITS
def test_a_disk_that_is_full_for_a_while(
    unbroken: Path, cache: Path, limit_bytes: str, said: str, tmp_path: Path
) -> None:
    """Each refusal is noted; the run ends as if there had been none, without another launch."""
    status, output = train(cache, tmp_path, limit_bytes, "2", "2.5", "600")
    assert status == 0 and said in output and "File too large" in output
    check_same(tmp_path, unbroken)
    assert (tmp_path / RunFiles.CHECKPOINTS / "8").is_dir()


@pytest.mark.slow
@LIMITS
def test_a_disk_that_stays_full(unbroken: Path, cache: Path, limit_bytes: str, said: str, tmp_path: Path) -> None:
    """The run stops, names the last good checkpoint, and resumes from it when there is room again."""
    status, output = train(cache, tmp_path, limit_bytes, "5", FOREVER, "1.5")
    assert status == 2 and said in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "File too large" in error and f"the last good checkpoint is step 3 in {tmp_path}" in error
    assert "repair the storage, then repeat the command to resume there" in error
    assert not (tmp_path / "params.npz").exists()
    status, output = train(cache, tmp_path, "0", "0", NEVER, "1.5")
    assert (status, output) == (0, "resuming after step 3 of 8\n")
    check_same(tmp_path, unbroken)


# --- A bucket


@pytest.fixture
def learnt() -> TrainState:
    return TrainState(step=jnp.int32(0), params={"w": jnp.arange(3, dtype=jnp.float32)}, opt_state=())


@pytest.fixture
def saved(learnt: TrainState, tmp_path: Path) -> Path:
    with contextlib.closing(Checkpoints(tmp_path, keep_last=2)) as checkpoints:
        for step in (1, 2):
            progress = Progress(consumed_batches=step, fingerprint="")
            checkpoints.save(learnt, progress, seed=0, validation_loss=1.0)
    return tmp_path


class Bucket:
    """A bucket that refuses some reads."""

    def __init__(self, refusals: int):
        self.refusals = refusals

    def install(self, patch: pytest.MonkeyPatch) -> None:
        real = ocp.StandardCheckpointHandler.restore

        def restore(handler: Any, *args: Any, **kwargs: Any) -> Any:
            if self.refusals:
                self.refusals -= 1
                raise BUCKET
            return real(handler, *args, **kwargs)

        patch.setattr(ocp.StandardCheckpointHandler, "restore", restore)
        patch.setattr(storage, "FIRST_PAUSE", 0.01)


def test_a_checkpoint_that_cannot_be_read_for_a_while_is_not_given_up(
    learnt: TrainState, saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Bucket(refusals=3).install(monkeypatch)
    with contextlib.closing(Checkpoints(saved, keep_last=2)) as checkpoints:
        restored = checkpoints.restore(learnt, seed=0, patience_seconds=60.0)
    assert restored is not None and restored[1].consumed_batches == 2
    assert sum("503" in message and "refused" in message for message in caplog.messages) == 3


def test_a_bucket_that_goes_on_refusing_loses_nothing(
    learnt: TrainState, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bucket(refusals=10**9).install(monkeypatch)
    with contextlib.closing(Checkpoints(saved, keep_last=2)) as checkpoints:
        with pytest.raises(
            UserError, match=r"^checkpoint 2 in .*: refused for .* \(UNAVAILABLE.*; nothing was changed"
        ):
            checkpoints.restore(learnt, seed=0, patience_seconds=0.05)
        assert checkpoints.steps() == [1, 2]


def test_mistakes() -> None:
    with pytest.raises(UserError, match="storage_seconds is 0: it must be more than 0"):
        Patience(storage_seconds=0)
    with pytest.raises(UserError, match="stall_seconds is 600: it must be more than storage_seconds"):
        Patience(stall_seconds=600)
