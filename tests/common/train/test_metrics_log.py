"""What a run records about its time: clocks, shares, utilisation, goodput, traces."""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from common.compute.ledger import ForwardFlops
from common.compute.length_sums import LengthSums
from common.data.batch import HostBatch
from common.files import read_rows, write_rows
from common.recipe import Execution
from common.train.checkpoints import Progress
from common.train.clock import WARM_UP, Clock, shares
from common.train.loop import fit
from common.train.metrics_log import memory, utilisation
from common.train.run_files import RunFiles
from common.train.task import Stream
from tests.tiny import Observer, Stopped, loader, setup, task, tiny, train_config

STEPS = 8


# --- Clock


def test_time_for_saving_and_validation_is_not_counted_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("common.train.clock.time.perf_counter", lambda: now)
    clock = Clock(Progress(consumed_batches=4, fingerprint="", train_seconds=100.0, data_seconds=9.0, eval_seconds=5.0))
    with clock.waiting_for_data():
        now += 0.25
    now += 1.0
    with clock.aside("eval"):
        now += 8.0
    with clock.aside("checkpoint"):
        now += 16.0
    now += 0.5
    assert clock.lap() == 1.75
    stamped = clock.stamp(Progress(consumed_batches=5, fingerprint=""))
    assert (stamped.train_seconds, stamped.data_seconds) == (101.75, 9.25)
    assert (stamped.eval_seconds, stamped.checkpoint_seconds) == (13.0, 16.0)


@dataclasses.dataclass
class Late:
    """A stream with one late batch."""

    stream: Stream
    step: int
    seconds: float

    @property
    def content(self) -> str:
        return self.stream.content

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        for step, host in enumerate(self.stream.iterate(start, stop), start=start + 1):
            if step == self.step:
                time.sleep(self.seconds)
            yield host


def test_waiting_training_saving_and_validation_are_recorded_apart(tmp_path: Path) -> None:
    of = task("gpt", Late(loader(), step=6, seconds=0.3))
    begun = time.perf_counter()
    fit(of, tmp_path, Observer())
    took = time.perf_counter() - begun
    rows = read_rows(tmp_path / RunFiles.TIMINGS)
    names = ("seconds", "data_seconds", "checkpoint_seconds", "eval_seconds")
    for a, b in itertools.pairwise(rows):
        assert all(a[name] <= b[name] for name in names) and a["time"] <= b["time"]
    waited = [b["data_seconds"] - a["data_seconds"] for a, b in itertools.pairwise(rows)]
    assert max(waited) == waited[3] >= 0.3  # while step 5 ran
    first_save, first_validation = 3, 4
    assert (rows[first_save - 1]["checkpoint_seconds"] == 0) and (rows[first_save]["checkpoint_seconds"] > 0)
    assert (rows[first_validation - 2]["eval_seconds"] == 0) and (rows[first_validation - 1]["eval_seconds"] > 0)
    last = rows[-1]
    assert sum(shares(last).values()) == pytest.approx(1.0)
    assert last["seconds"] + last["checkpoint_seconds"] + last["eval_seconds"] < took


# --- Speed


def test_speed_skips_the_first_steps_of_each_launch(tmp_path: Path) -> None:
    of = dataclasses.replace(task("gpt"), peak_flops_per_second=1e9)
    with pytest.raises(Stopped):
        fit(of, tmp_path, Observer(stop_at=7))
    fit(of, tmp_path, Observer())  # from step 6
    rows, metrics = read_rows(tmp_path / RunFiles.TIMINGS), read_rows(tmp_path / RunFiles.METRICS)
    assert [row["step"] for row in rows if "tokens_per_second" not in row] == [1, 2, 7, 8]
    assert WARM_UP == 2
    for row, before, after in zip(rows[2:6], metrics[1:5], metrics[2:6], strict=True):
        tokens = after["tokens"] - before["tokens"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["step_seconds"])
        assert {key: row[key] for key in ("mfu_full_attention", "mfu_causal_half", "hfu")} == utilisation(
            of.setup, row["step_seconds"], 1e9
        )


def test_utilisation_is_flops_over_peak() -> None:
    """It is a half at twice the peak's time, and a quarter of that over four devices."""
    of = setup(tiny("gpt"), train_config())
    forward = of.flops_per_step() / 3
    found = utilisation(of, step_seconds=2.0, peak_flops_per_second=3 * forward)
    assert found["mfu_full_attention"] == pytest.approx(0.5)
    assert found["mfu_causal_half"] < found["mfu_full_attention"]
    sharded = dataclasses.replace(of.train, mesh=dataclasses.replace(of.train.mesh, data=2, fsdp=2))
    quarter = utilisation(dataclasses.replace(of, train=sharded), 2.0, 3 * forward)
    assert quarter == pytest.approx({name: share / 4 for name, share in found.items()})


@pytest.mark.parametrize(
    ("execution", "expected"),
    [
        # dense 1000, of which the head 100 and MLPs 600 (200 out); attention 40 in full and 20 with its causal part at
        # half
        (Execution(attention="plain"), 3 * 1040),
        (Execution(attention="blocked"), 3 * 1020 + 10),
        (Execution(attention="blocked", mlp_chunk=8), 3 * 1020 + 10 + 400),
        (Execution(attention="plain", remat="dots"), 3 * 1040 + 40),
        (Execution(attention="plain", remat="attention"), 3 * 1040 + 700 + 40),
        (Execution(attention="blocked", remat="attention"), 3 * 1020 + 10 + 700),
        (Execution(attention="plain", remat="full"), 3 * 1040 + 700 + 40),
        (Execution(attention="blocked", remat="offload", mlp_chunk=8), 3 * 1020 + 10 + 700 + 20),
    ],
)
def test_hardware_flops_count_what_is_done_twice(execution: Execution, expected: int) -> None:
    """tests/common/compute/test_traffic.py compares with what compilers do."""
    flops = ForwardFlops(dense=1000, head=100, mlp=600, mlp_out=200, attention_full=40, attention_causal_half=20)
    assert flops.train_hardware(execution) == expected


@pytest.mark.parametrize("family", ["gpt", "t5like"])
def test_the_parts_of_dense_products(family: str) -> None:
    """Closed forms: one layer per stack, two matrices of 16 x 32 in an MLP, a head of 16 x vocabulary."""
    of = setup(tiny(family), train_config())
    rows, inputs, targets = of.row_slots
    flops = of.model.flops(LengthSums.of_rows(*of.row_slots))
    assert flops.head == 2 * rows * targets * 16 * of.model.vocab_size
    assert flops.mlp == 2 * flops.mlp_out == 2 * rows * (inputs + targets) * 2 * 16 * 32
    assert flops.head + flops.mlp < flops.dense


@dataclasses.dataclass
class Device:
    bytes_in_use: int

    def memory_stats(self) -> dict[str, int] | None:
        return (
            {"bytes_in_use": self.bytes_in_use, "peak_bytes_in_use": 2 * self.bytes_in_use}
            if self.bytes_in_use
            else None
        )


def test_memory_is_that_of_the_fullest_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5), Device(7)])
    assert memory() == {"hbm_bytes": 7, "hbm_peak_bytes": 14}
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(0)])
    assert memory() == {}


# --- Goodput


def test_goodput_counts_lost_steps_and_the_time_between_launches(tmp_path: Path) -> None:
    of = task("gpt")
    begun = time.time()
    with pytest.raises(Stopped):
        fit(of, tmp_path, Observer(stop_at=5))  # steps 4 and 5 are lost
    lost = read_rows(tmp_path / RunFiles.TIMINGS)[3:]
    fit(of, tmp_path, Observer())
    fit(of, tmp_path, Observer())  # nothing was left to do, and no launch is noted
    launches, last = read_rows(tmp_path / RunFiles.LAUNCHES), read_rows(tmp_path / RunFiles.TIMINGS)[-1]
    assert len(launches) == 2 and begun <= launches[0]["started"] < launches[1]["started"] < last["time"]
    wall = last["time"] - launches[0]["started"]
    assert last["goodput"] == pytest.approx(last["seconds"] / wall)
    assert last["seconds"] + sum(row["step_seconds"] for row in lost) < wall


def test_a_launch_long_ago_lowers_goodput(tmp_path: Path) -> None:
    of = task("gpt")
    with pytest.raises(Stopped):
        fit(of, tmp_path, Observer(stop_at=4))
    (launch,) = read_rows(tmp_path / RunFiles.LAUNCHES)
    write_rows(tmp_path / RunFiles.LAUNCHES, [{"started": launch["started"] - 1e6}])
    fit(of, tmp_path, Observer())
    last = read_rows(tmp_path / RunFiles.TIMINGS)[-1]
    assert last["goodput"] == pytest.approx(last["seconds"] / 1e6, rel=1e-3)


# --- Traces


@pytest.mark.parametrize(("steps", "traced"), [(2, True), (100, True), (0, False)])
def test_steps_are_traced(steps: int, traced: bool, tmp_path: Path) -> None:
    """A trace covers some steps, or all if there are fewer, and does not change the recorded steps."""
    observer = Observer()
    fit(dataclasses.replace(task("gpt"), profile_steps=steps), tmp_path, observer)
    found = [path.name for path in tmp_path.rglob("*.xplane.pb")]
    assert len(found) == traced
    assert any(f"tensorboard --logdir {tmp_path / 'profile'}" in note for note in observer.notes) == traced
    assert [row["step"] for row in read_rows(tmp_path / RunFiles.METRICS)] == list(range(1, STEPS + 1))


def test_rows_of_metrics_hold_no_times(tmp_path: Path) -> None:
    """They must be the same to the bit whenever they are written."""
    fit(dataclasses.replace(task("gpt"), peak_flops_per_second=1e9), tmp_path, Observer())
    keys: set[str] = set().union(*map(dict[str, Any].keys, read_rows(tmp_path / RunFiles.METRICS)))
    assert not [key for key in keys if "second" in key or "time" in key or "mfu" in key or "goodput" in key]
