"""Losses that are not finite or are spikes: the limit is a closed form, and skipped batches leave no trace."""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.data.batch import HostBatch
from common.data.loader import chain
from common.errors import UserError
from common.files import read_rows
from common.train import run_dir as rd
from common.train.anomalies import Judge, spike_limit
from common.train.checkpoints import Checkpoints
from common.train.config import Anomalies
from common.train.loop import Fitted, fit
from common.train.programs import make_programs
from common.train.run_files import RunFiles
from common.train.state import init_state
from common.train.step import Guard
from common.train.task import Stream, Task
from experiments.running.pipeline import compiled_step
from tests.common.train.runs import STEPS, same_bits
from tests.experiments.tiny_study import tiny_run, with_train
from tests.tiny import Observer, Stopped, loader, numbers, task


@dataclasses.dataclass
class Spoilt:
    """A stream with other loss weights or targets in some batches."""

    stream: Stream
    infinite: frozenset[int] = frozenset()
    """Numbers of batches, from 1, with infinite weights: the loss is not finite."""
    leaping: frozenset[int] = frozenset()
    """Numbers of batches with targets that no text has, so that their losses are spikes."""

    @property
    def content(self) -> str:
        return self.stream.content

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        for step, host in enumerate(self.stream.iterate(start, stop), start=start + 1):
            batch = host.batch
            if step in self.infinite:
                batch = dataclasses.replace(batch, weights_BT=np.full_like(batch.weights_BT, np.inf))
            if step in self.leaping:
                batch = dataclasses.replace(batch, targets_BT=np.full_like(batch.targets_BT, 2))
            yield dataclasses.replace(host, batch=batch)


@dataclasses.dataclass
class Without:
    """A stream from which some batches are removed."""

    stream: Stream
    numbers: frozenset[int]

    @property
    def content(self) -> str:
        return self.stream.content

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        kept = [step for step in range(1, stop + len(self.numbers) + 1) if step not in self.numbers]
        for step in kept[start:stop]:
            yield from self.stream.iterate(step - 1, step)


def run(folder: Path, stream: Stream, observer: Observer | None = None, **anomalies: Any) -> tuple[Task, Fitted]:
    of = task("gpt", stream, anomalies=Anomalies(**anomalies))
    return of, fit(of, folder, observer or Observer())


# --- What is an anomaly


def test_the_limit_is_median_and_deviation() -> None:
    losses = np.random.default_rng(0).normal(3.0, 0.5, 10_001)
    assert spike_limit(losses.tolist(), 4.0) == pytest.approx(3.0 + 4.0 * 0.5, rel=0.02)  # normal numbers
    one_wild = [*losses.tolist(), 1e9]
    assert spike_limit(one_wild, 4.0) == pytest.approx(spike_limit(losses.tolist(), 4.0), rel=1e-3)


def test_the_limit_looks_two_steps_back() -> None:
    """It uses neither the step before, whose loss may not have arrived, nor steps beyond the window."""
    judge = Judge(Anomalies(on_spike="stop", spike_window=3, spike_deviations=2.0), ())
    losses = [5.0, 1.0, 2.0, 4.0, 8.0, 16.0]
    for step, loss in enumerate(losses, start=1):
        judge.learnt(step, loss)
        later = Judge(judge.config, judge.recent())
        assert later.limit(step + 1) == judge.limit(step + 1)
        assert later.limit(step + 2) == judge.limit(step + 2)
        for ahead in (1, 2):
            seen = losses[: step + ahead - 2]
            expected = spike_limit(seen[-3:], 2.0) if len(seen) >= 3 else math.inf
            assert judge.limit(step + ahead) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_verdicts(value: float) -> None:
    judge = Judge(Anomalies(on_nonfinite="skip", on_spike="roll_back"), ())
    assert judge.verdict(value, 1.0, math.inf) == judge.verdict(1.0, value, math.inf) == "skip"
    assert judge.verdict(2.0, 1.0, 1.5) == "roll_back"
    assert judge.verdict(1.5, 1.0, 1.5) is judge.verdict(1.5, 1.0, math.inf) is None


@pytest.mark.parametrize("spoilt", ["nan", "infinite weights", "limit"])
def test_a_guarded_step_keeps_the_state_to_the_bit(spoilt: str) -> None:
    setup = task("gpt", anomalies=Anomalies(on_nonfinite="skip")).setup
    made = make_programs(setup)
    with jax.set_mesh(made.mesh):
        state = init_state(made.model, made.optimizer, 0, made.shardings)
        host = loader().batch(0).batch
        before = jax.device_get(state)
        if spoilt == "infinite weights":
            host = dataclasses.replace(host, weights_BT=np.full_like(host.weights_BT, np.inf))
        if spoilt == "nan":
            host = dataclasses.replace(host, weights_BT=np.full_like(host.weights_BT, np.nan))
        limit = np.float32(0.5 if spoilt == "limit" else np.inf)
        guard = Guard(limit=limit, updates=np.int32(0), rate_after_skip=np.float32(0))
        after, metrics = made.train_step(state, made.put(host), numbers(1e-2, guard=guard))
    same_bits(after, before)
    assert math.isfinite(metrics["loss"]) == (spoilt == "limit")


def test_a_guarded_step_is_planned_as_it_runs(tmp_path: Path) -> None:
    """Ahead-of-time compilation includes the guard's three scalars as arguments."""
    run = tiny_run(tmp_path)
    plain, other = map(compiled_step, (run, with_train(run, anomalies=Anomalies(on_nonfinite="skip"))))
    assert other.memory_analysis().argument_size_in_bytes == plain.memory_analysis().argument_size_in_bytes + 12


# --- What becomes of it


@pytest.mark.parametrize(
    ("bad", "policy"),
    [
        *(((1,), policy) for policy in ("skip", "roll_back")),
        pytest.param((5,), "skip", marks=pytest.mark.slow),
        pytest.param((5,), "roll_back", marks=pytest.mark.slow),
        ((4, 5, 8), "skip"),
        pytest.param((4, 5, 8), "roll_back", marks=pytest.mark.slow),
        pytest.param((3, 6), "skip", marks=pytest.mark.slow),
        ((3, 6), "roll_back"),
    ],
    ids=str,
)
def test_a_skipped_batch_leaves_no_trace(policy: Any, bad: tuple[int, ...], tmp_path: Path) -> None:
    """Parameters, losses and fingerprints equal, to the bit, those of a run over a stream without it."""
    numbers, observer = frozenset(bad), Observer()
    of, fitted = run(tmp_path / "a", Spoilt(loader(), infinite=numbers), observer, on_nonfinite=policy)
    # The same number of updates and the same schedule; the step is compiled with or without its guard, as above.
    lacking = dataclasses.replace(of, stream=Without(loader(), numbers), config={"other": 1})
    fit(lacking, tmp_path / "b", Observer())
    rows, expected = (read_rows(tmp_path / name / RunFiles.METRICS) for name in "ab")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    learnt = [row for row in rows if "loss" in row]
    assert {row["step"] for row in rows if "skipped" in row} == numbers == set(fitted.progress.skipped)
    same = ("loss", "grad_norm", "learning_rate", "fingerprint", "examples", "tokens", "loss_tokens")
    for found, other in zip(learnt, expected, strict=False):
        assert {key: found[key] for key in same} == {key: other[key] for key in same}
    assert all("loss" not in row and "learning_rate" not in row for row in rows if "skipped" in row)
    # The fingerprint that is logged is the batch's own.
    for step in bad:
        batch = f"{loader().batch(step - 1).fingerprint:032x}"
        assert rows[step - 1]["skipped_batch"] == batch
        assert any(note.startswith(f"step {step}: loss ") and batch in note for note in observer.notes)
    chained = loader().content
    for step in range(1, STEPS + 1):
        if step not in numbers:
            chained = chain(chained, loader().batch(step - 1).fingerprint)
    assert fitted.progress.fingerprint == rows[-1]["fingerprint"] == chained


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_resumed_in_between_it_is_the_same_run(policy: str, tmp_path: Path) -> None:
    stream = Spoilt(loader(), infinite=frozenset({2, 5}))
    of, whole = run(tmp_path / "whole", stream, on_nonfinite=policy)
    for stop in (2, 5, 7):
        with pytest.raises(Stopped):
            fit(of, tmp_path / "broken", Observer(stop_at=stop))
    broken = fit(of, tmp_path / "broken", Observer())
    same_bits(broken.params, whole.params)
    assert (tmp_path / "broken" / RunFiles.METRICS).read_bytes() == (tmp_path / "whole" / RunFiles.METRICS).read_bytes()
    assert rd.rolled_back_batches(tmp_path / "broken", 8) == (
        frozenset({2, 5}) if policy == "roll_back" else frozenset()
    )


def test_a_run_killed_after_the_decision_still_rolls_back(tmp_path: Path) -> None:
    """The batches to skip are recorded first, and a checkpoint that has learnt from them is not restored."""
    of, whole = run(tmp_path / "whole", Spoilt(loader(), infinite=frozenset({4})), on_nonfinite="roll_back")
    clean = task("gpt", loader(), anomalies=Anomalies(on_nonfinite="roll_back"))
    fit(clean, tmp_path / "killed", Observer())  # to the end: its checkpoints, 6 and 8, have learnt from batch 4
    rd.note_rollback(tmp_path / "killed", {"step": 4, "first": 4})
    again = Observer()
    fitted = fit(of, tmp_path / "killed", again)
    assert again.steps == list(range(1, STEPS + 1))
    same_bits(fitted.params, whole.params)


def test_a_range_is_rolled_back(tmp_path: Path) -> None:
    """Batches 5 to 7 are skipped because of the last of them, starting from the checkpoint before them."""
    observer = Observer()
    policy = {"on_nonfinite": "roll_back", "rolled_back": 3}
    _, fitted = run(tmp_path, Spoilt(loader(), infinite=frozenset({7})), observer, **policy)
    assert fitted.progress.skipped == (5, 6, 7)
    assert any(note.endswith("batches 5 to 7 are skipped") for note in observer.notes)
    assert "resuming after step 3 of 8" in observer.notes
    (row,) = read_rows(tmp_path / RunFiles.ROLLBACKS)
    assert (row["first"], row["step"]) == (5, 7)


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_too_many_in_a_row_stop_the_run(policy: str, tmp_path: Path) -> None:
    stream = Spoilt(loader(), infinite=frozenset({2, 4, 5, 6, 7}))
    message = r"^step 6: loss .* in the last 3\); stopped, the last good checkpoint is step 3 in "
    with pytest.raises(UserError, match=message):
        run(tmp_path, stream, on_nonfinite=policy, max_in_a_row=2)


SPIKES = {"spike_window": 3, "spike_deviations": 6.0}


@pytest.mark.parametrize("policy", ["ignore", "stop", "skip", "roll_back"])
def test_a_spike(policy: Any, tmp_path: Path) -> None:
    """The loss above the limit that the losses before it give, and no other."""
    stream, observer, said = Spoilt(loader(), leaping=frozenset({7})), Observer(), ""
    if policy == "stop":
        with pytest.raises(UserError, match="^step 7: loss ") as stopped:
            run(tmp_path, stream, observer, on_spike=policy, **SPIKES)
        said = str(stopped.value)
    else:
        _, fitted = run(tmp_path, stream, observer, on_spike=policy, **SPIKES)
        assert fitted.progress.skipped == (() if policy == "ignore" else (7,))
        said = " ".join(observer.notes)
    losses = {row["step"]: row["loss"] for row in read_rows(tmp_path / RunFiles.METRICS) if "loss" in row}
    before = [losses[step] for step in (3, 4, 5)]
    median = statistics.median(before)
    limit = median + 6.0 * 1.4826 * statistics.median(abs(loss - median) for loss in before)
    if policy == "ignore":
        assert losses[7] > limit and not said
    else:
        assert 7 not in losses
        assert float(said.partition("limit ")[2].partition(",")[0]) == pytest.approx(limit, rel=1e-6)


def test_with_policies_off_the_step_is_what_it_was() -> None:
    """No guard is in the program."""
    plain, off = (
        make_programs(task("gpt", **change).setup) for change in ({}, {"anomalies": Anomalies(on_spike="stop")})
    )
    assert plain.train_step.__wrapped__.__qualname__ == off.train_step.__wrapped__.__qualname__


def test_a_checkpoint_knows_what_it_skipped(tmp_path: Path) -> None:
    of, fitted = run(
        tmp_path, Spoilt(loader(), infinite=frozenset({5})), on_nonfinite="skip", on_spike="stop", **SPIKES
    )
    again = fit(of, tmp_path, Observer())
    assert again.progress == fitted.progress and again.progress.skipped == (5,)
    assert [step for step, _ in again.progress.losses] == [3, 4, 6, 7, 8]
    assert Checkpoints(tmp_path / RunFiles.CHECKPOINTS, keep_last=2).steps() == [6, 8]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spike_window": 0}, "spike_window is 0: it must be 1 or more"),
        ({"spike_deviations": 0.0}, "spike_deviations is 0.0: it must be more than 0"),
        ({"rolled_back": 11}, r"max_in_a_row is 10: it must be at least rolled_back \(11\)"),
        ({"on_spike": "roll_back", "rolled_back": 4}, "rolled_back is 4 with checkpoint_every 3 and keep_last 2"),
    ],
)
def test_mistakes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task("gpt", anomalies=Anomalies(**values))
