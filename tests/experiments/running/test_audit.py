"""The audit of a step's FLOPs: exact, cheap for any batch, and never the end of a run."""

from pathlib import Path
from typing import Any

import jax
import pytest

from common.recipe import Execution
from common.sharding.shape import MeshShape
from common.train.programs import Setup
from experiments.running import audit
from experiments.running.audit import StepCount, count_step
from experiments.running.pipeline import make_setup
from tests.experiments.tiny_study import tiny_run, with_data, with_train

KERNELS = Execution(scan_layers=True, remat="full", mlp_chunk=8, attention="splash", loss_chunk=16)


def setup_of(folder: Path, arm: str, rows: int, **train: Any) -> Setup:
    return make_setup(with_train(with_data(tiny_run(folder, arm), rows=rows), **train))


@pytest.mark.parametrize("arm", ["gpt", "t5like"])
def test_a_step_for_a_pod_is_counted_here_without_compiling(
    arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of 2^20 rows over 2^10 devices, in kernels and in pieces, matches the ledger to the unit."""
    monkeypatch.setattr(jax.stages.Lowered, "compile", None)
    train = {"mesh": MeshShape(fsdp=2**10), "accumulation": 4, "sharding": "sequence", "execution": KERNELS}
    setup = setup_of(tmp_path, arm, 2**20, **train)
    assert count_step(setup) == StepCount(flops=float(setup.flops_per_step()))


@pytest.mark.parametrize("error", [MemoryError(), KeyError("%while.3"), RuntimeError("RESOURCE_EXHAUSTED:\n  17 GiB")])
def test_an_error_is_returned_as_the_reason(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(audit, "lower_step", fail)
    count = count_step(setup_of(tmp_path, "gpt", 4))
    assert count.flops is None and "\n" not in count.why_not
    assert count.why_not.startswith(type(error).__name__) and str(error).split("\n")[-1].strip() in count.why_not
