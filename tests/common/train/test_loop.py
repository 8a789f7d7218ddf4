"""The loop: what it records, what it refuses, and how it stops when a loss is not finite."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.compute.length_sums import LengthSums
from common.data.batch import HostBatch
from common.data.loader import chain
from common.errors import UserError
from common.files import read_rows
from common.report.certificate import certify
from common.report.results import ArmResult, Flops
from common.sharding.shape import MeshShape
from common.train.environment import MACHINE_KEYS
from common.train.loop import Fitted, fit
from common.train.run_files import RunFiles
from common.train.schema import SCHEMA_VERSION
from common.train.task import Stream
from tests.common.report.studies import finished, study_of
from tests.common.train.runs import STEPS, Unbroken, families, same_bits, saved_steps
from tests.tiny import (
    DATA,
    INPUTS,
    ROWS,
    TARGETS,
    Observer,
    Stopped,
    loader,
    task,
    tiny,
)

# --- What is recorded


@families
def test_metrics_are_complete(unbroken: dict[str, Unbroken], family: str) -> None:
    """One row per step, with counts and fingerprints that agree with the loader's batches, counted here."""
    run = unbroken[family]
    rows = read_rows(run.folder / RunFiles.METRICS)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) == run.observer.steps
    stream = loader()
    fingerprint, source_fingerprint, examples, tokens, loss_tokens = stream.content, "", 0, 0, 0
    flops = run.task.setup.model.flops(LengthSums.of_rows(ROWS, INPUTS, TARGETS)).train_full_attention
    for row in rows:
        host = stream.batch(row["step"] - 1)
        segments = np.concatenate([host.batch.input_segments_BI, host.batch.target_segments_BT], axis=1)
        fingerprint = chain(fingerprint, host.fingerprint)
        source_fingerprint = chain(source_fingerprint, host.source_fingerprint)
        examples += sum(len(set(of_row) - {0}) for of_row in segments.tolist())
        tokens += int((segments > 0).sum())
        loss_tokens += int((host.batch.weights_BT > 0).sum())
        counted = {"examples": examples, "tokens": tokens, "loss_tokens": loss_tokens, "fingerprint": fingerprint}
        counted |= {"slots": row["step"] * ROWS * (INPUTS + TARGETS), "flops": row["step"] * flops}
        counted |= {"source_fingerprint": source_fingerprint}
        assert {name: row[name] for name in counted} == counted
        measured = {"loss", "grad_norm", "learning_rate"}
        assert all(math.isfinite(row[name]) and row[name] > 0 for name in measured)
        validated = {"validation_loss"} if row["step"] in (4, 8) else set()
        assert set(row) == {"step"} | set(counted) | measured | validated
    assert [row["learning_rate"] for row in rows[:3]] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert rows[-1]["loss"] < rows[0]["loss"]
    timings = read_rows(run.folder / RunFiles.TIMINGS)
    assert [row["step"] for row in timings] == list(range(1, STEPS + 1))
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(timings))
    assert timings[-1]["seconds"] == pytest.approx(sum(row["step_seconds"] for row in timings))


@families
def test_validation_loss_is_the_mean_over_weighted_tokens(unbroken: dict[str, Unbroken], family: str) -> None:
    run = unbroken[family]

    @jax.jit
    def logits(params: Any, batch: Any) -> jax.Array:
        model = run.fitted.model.merge(params)
        return model.hidden(batch) @ model.head()

    total = weight = 0.0
    for host in run.task.validation:
        x_BTV = np.asarray(logits(run.fitted.params, host.batch), np.float64)
        chosen_BT = np.take_along_axis(x_BTV, host.batch.targets_BT[..., None], axis=-1)[..., 0]
        total += ((np.log(np.exp(x_BTV).sum(-1)) - chosen_BT) * host.batch.weights_BT).sum()
        weight += host.batch.weights_BT.sum()
    found = read_rows(run.folder / RunFiles.METRICS)[-1]["validation_loss"]
    assert found == pytest.approx(total / weight, rel=1e-6)


def test_the_run_directory_records_config_and_environment(unbroken: dict[str, Unbroken]) -> None:
    run = unbroken["gpt"]
    config = json.loads((run.folder / RunFiles.CONFIG).read_text())
    assert config == {"schema_version": SCHEMA_VERSION, **run.task.config}
    environment = json.loads((run.folder / RunFiles.ENVIRONMENT).read_text())
    assert set(MACHINE_KEYS) < set(environment)
    assert {key: environment[key] for key in DATA} == DATA


# --- What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": MeshShape(data=3)}, r"data.rows is 8, .*\(1 x 3 x 1 x 1\); nearest: 9"),
        ({"mesh": MeshShape(data=2, fsdp=4), "accumulation": 2}, r"\(1 x 2 x 4 x 2\); nearest: 16"),
        ({"accumulation": 5}, r"\(1 x 1 x 1 x 5\); nearest: 10"),
    ],
)
def test_rows_that_do_not_divide_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        fit(task("gpt", **change), tmp_path / "arm", Observer())
    assert not (tmp_path / "arm").exists()


# --- What is not finite


@dataclasses.dataclass
class Poisoned:
    """A stream with infinite loss weights in one batch."""

    stream: Stream
    step: int

    @property
    def content(self) -> str:
        return self.stream.content

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        for step, host in enumerate(self.stream.iterate(start, stop), start=start + 1):
            if step == self.step:
                weights = np.full_like(host.batch.weights_BT, np.inf)
                host = dataclasses.replace(host, batch=dataclasses.replace(host.batch, weights_BT=weights))
            yield host


@pytest.mark.parametrize(("step", "good"), [(2, None), (5, 3), (6, 3), (8, 6)])
def test_a_loss_that_is_not_finite_stops_the_run(
    unbroken: dict[str, Unbroken], step: int, good: int | None, tmp_path: Path
) -> None:
    """The message names the step and the last good checkpoint; with a clean stream the run resumes to the same bits."""
    run = unbroken["gpt"]
    last = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good} in "
    with pytest.raises(UserError, match=f"^step {step}: loss (nan|inf), .*{last}"):
        fit(dataclasses.replace(run.task, stream=Poisoned(run.task.stream, step)), tmp_path, Observer())
    assert saved_steps(tmp_path) == set(range(3, step, 3))
    assert [row["step"] for row in read_rows(tmp_path / RunFiles.METRICS)] == list(range(1, step))
    fitted = fit(run.task, tmp_path, Observer())
    same_bits(fitted.params, run.fitted.params)
    assert (tmp_path / RunFiles.METRICS).read_bytes() == run.metrics()


# --- Arms that differ


def result_of(arm: str, family: str, fitted: Fitted) -> ArmResult:
    """Returns a result like that of a finished arm; fields that no check of the data reads are the same for all."""
    progress = fitted.progress
    measured = ("train_loss", "validation_loss", "train_seconds", "tokens_per_second", "data_wait_share")
    return ArmResult(
        arm=arm,
        parameters=tiny(family).param_count(),
        steps=progress.consumed_batches,
        flops=Flops(full_attention=1.0, causal_half=1.0, six_nd=1.0, useful_full_attention=progress.useful_flops),
        examples=progress.examples,
        tokens=progress.tokens,
        loss_tokens=progress.loss_tokens,
        slots=progress.consumed_batches * ROWS * (INPUTS + TARGETS),
        input_fill=1.0,
        target_fill=1.0,
        fingerprint=progress.fingerprint,
        xla_flops_per_step=1.0,
        ledger_flops_per_step=1.0,
        scores=(),
        **dict.fromkeys(measured, 1.0),
    )


@pytest.mark.parametrize(
    ("change", "differ"),
    [
        ({}, set()),
        ({"order": 1}, {"same data in the same order"}),
        ({"tokenizer_hash": "other"}, {"same data in the same order", "same tokenizer"}),
        ({"content_id": "version 2"}, {"same data in the same order", "same dataset version"}),
    ],
    ids=["same", "order", "tokenizer", "dataset"],
)
def test_the_certificate_reports_arms_with_other_data(
    unbroken: dict[str, Unbroken], change: dict[str, Any], differ: set[str], tmp_path: Path
) -> None:
    one, other = unbroken["t5like"], unbroken["gpt"]
    fitted, folders = other.fitted, {"t5like": one.folder, "gpt": other.folder}
    if change:
        folders["gpt"] = tmp_path
        data = {**DATA, **{key: value for key, value in change.items() if key in DATA}}
        with pytest.raises(Stopped):
            fit(task("gpt", loader(**change), data), tmp_path, Observer(stop_at=2))
        fingerprint = read_rows(tmp_path / RunFiles.METRICS)[-1]["fingerprint"]
        fitted = dataclasses.replace(fitted, progress=dataclasses.replace(fitted.progress, fingerprint=fingerprint))
    results = [result_of("t5like", "t5like", one.fitted), result_of("gpt", "gpt", fitted)]
    runs = []
    for result in results:
        recorded = json.loads((folders[result.arm] / RunFiles.ENVIRONMENT).read_text())
        recorded_chain = [row["fingerprint"] for row in read_rows(folders[result.arm] / RunFiles.METRICS)]
        runs.append(
            dataclasses.replace(finished(result.arm, environment=recorded, chain=recorded_chain), result=result)
        )
    certificate = certify(study_of(*runs))
    assert {check.name for check in certificate.checks if not check.agrees} == differ
    assert certificate.agrees == (not differ)
    if differ:
        detail = certificate.checks[0].detail
        assert detail.startswith("the arms differ from their first step (1): other order, tokenizer")
        unrecorded = [dataclasses.replace(run, metrics=()) for run in runs]
        assert not certify(study_of(*unrecorded)).agrees  # by the last fingerprints alone
