"""Scores trained models and writes their results."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.config import from_earlier_json, from_json, to_json
from common.errors import UserError
from common.evals.decoding import greedy_decoder
from common.evals.measure import TextScore, TurnCost
from common.evals.text_metrics import ALL, score_texts
from common.files import read_json, read_rows, write_json, write_rows
from common.progress import ProgressBars
from common.report.results import ArmResult, Flops
from common.sharding.hosts import on_first_process
from common.train import run_dir as rd
from common.train.loop import Fitted
from common.train.metrics_log import last_losses
from common.train.run_files import RunFiles
from experiments.run import Run, made_from
from experiments.running.audit import count_step
from experiments.running.multi_turn import measure
from experiments.running.pipeline import Data, make_setup
from experiments.running.scored_splits import ScoredSplit


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run of a study with its data, and where its results go."""

    name: str
    run: Run
    folder: Path
    """The run directory."""
    data: Data
    tests: dict[str, ScoredSplit]
    """The splits to score, by name."""


def score_run(opened: OpenRun, fitted: Fitted, progress: ProgressBars) -> ArmResult:
    """Decodes the test splits and writes `samples.jsonl` and `result.json`.

    All processes decode, the first one writes. The result is complete on disk before the audit of its FLOPs, which only
    adds a count.
    """
    samples: list[dict[str, Any]] = []
    scores: list[TextScore] = []
    name, evaluation = opened.name, opened.run.evaluation
    decode = greedy_decoder(
        fitted.model,
        fitted.params,
        fitted.mesh,
        opened.data.tokenizer,
        rows=evaluation.rows,
        max_new_tokens=evaluation.max_new_tokens,
    )
    for split, test in opened.tests.items():
        decoded = _decode_split(name, split, test, decode, progress)
        predictions, targets = ([sample[field] for sample in decoded] for field in ("prediction", "target"))
        groups = [sample["group"] for sample in decoded]
        scores += score_texts(
            predictions,
            targets,
            None if None in groups else groups,
            split,
            inputs=[sample["inputs"] for sample in decoded],
            in_training=test.in_training,
        )
        samples += decoded
    turns = _time_conversation(opened, fitted, progress)
    progress.say(f"{name}: counting the FLOPs of a step")

    def write() -> dict[str, Any]:
        result = dataclasses.replace(
            _result(opened, fitted, tuple(scores)), multi_turn=turns, made_from=made_from(opened.run)
        )
        write_rows(opened.folder / RunFiles.SAMPLES, samples)
        write_json(opened.folder / RunFiles.RESULT, to_json(result))
        count = count_step(make_setup(opened.run))
        audited = to_json(dataclasses.replace(result, xla_flops_per_step=count.flops, why_not_counted=count.why_not))
        write_json(opened.folder / RunFiles.RESULT, audited)
        return audited

    return from_json(ArmResult, on_first_process(write))


def finished_result(opened: OpenRun) -> ArmResult | None:
    """Returns the result of a run that has been trained to its last step and scored; None where work remains.

    The result must come from the same data and config, apart from the fields that only say how a run is computed.
    """
    expected = made_from(opened.run)

    def read() -> dict[str, Any] | None:
        try:
            described = read_json(opened.folder / RunFiles.RESULT)
            result, metrics = from_earlier_json(ArmResult, described), read_rows(opened.folder / RunFiles.METRICS)
            samples = len(read_rows(opened.folder / RunFiles.SAMPLES))
        except UserError:  # absent, damaged or of another version
            return None
        decoded = sum(score.examples for score in result.scores if score.group == ALL)
        same_data = not rd.other_data(opened.folder, opened.data.identity)
        current = same_data and (result.made_from, result.steps, samples) == (expected, opened.run.steps, decoded)
        last = metrics[-1] if metrics else {}
        recorded = (last.get("step"), last.get("fingerprint")) == (result.steps, result.fingerprint)
        return described if current and recorded else None

    described = on_first_process(read)
    return None if described is None else from_earlier_json(ArmResult, described)


def _decode_split(
    name: str, split: str, test: ScoredSplit, decode: Callable[..., list[str]], progress: ProgressBars
) -> list[dict[str, Any]]:
    """Returns a row of `samples.jsonl` for each example."""
    texts = test.texts()
    progress.say(f"{name}: decoding {len(texts):,} examples of {split}")
    with progress.bar(f"{name}: decoding {split}", len(texts)) as advance:
        predictions = decode([example.inputs_I for example in test.records.examples.make(test.chosen_E)], advance)
    return [
        {
            "split": split,
            "group": record.get("group"),
            "inputs": record["inputs"],
            "target": record["targets"],
            "prediction": prediction,
            "correct": prediction == record["targets"],
        }
        for record, prediction in zip(texts, predictions, strict=True)
    ]


def _time_conversation(opened: OpenRun, fitted: Fitted, progress: ProgressBars) -> tuple[TurnCost, ...]:
    plan = opened.run.evaluation.multi_turn
    if plan is None:
        return ()
    progress.say(f"{opened.name}: timing a conversation of {plan.turns} turns")
    with progress.bar("timing a conversation", plan.turns) as advance:
        return tuple(measure(opened.run.model, fitted.model, fitted.params, fitted.mesh, plan, advance))


def _result(opened: OpenRun, fitted: Fitted, scores: tuple[TextScore, ...]) -> ArmResult:
    """Returns the run's counts, losses and scores, without the audit of its FLOPs."""
    run, done = opened.run, fitted.progress
    rows, input_length, target_length = run.row_slots
    steps = done.consumed_batches
    step_flops = run.model.flops(run.data.length_sums)
    train_loss, validation_loss = last_losses(opened.folder, steps)
    return ArmResult(
        arm=opened.name,
        parameters=run.model.param_count(),
        steps=steps,
        flops=Flops(
            full_attention=float(steps * step_flops.train_full_attention),
            causal_half=float(steps * step_flops.train_causal_half),
            six_nd=float(steps * step_flops.train_six_nd),
            useful_full_attention=done.useful_flops,
        ),
        examples=done.examples,
        tokens=done.tokens,
        loss_tokens=done.loss_tokens,
        slots=steps * rows * (input_length + target_length),
        input_fill=done.input_tokens / (steps * rows * input_length) if input_length else None,
        target_fill=(done.tokens - done.input_tokens) / (steps * rows * target_length),
        train_loss=train_loss,
        validation_loss=validation_loss,
        train_seconds=done.train_seconds,
        tokens_per_second=done.tokens / done.train_seconds,
        data_wait_share=done.data_seconds / done.train_seconds,
        fingerprint=done.fingerprint,
        xla_flops_per_step=None,
        why_not_counted="the run ended before its count",
        ledger_flops_per_step=float(step_flops.train_full_attention),
        scores=scores,
    )
