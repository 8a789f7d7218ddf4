"""From an experiment to a trained and scored arm: data, task, run, scores."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from common.compute.chips import chip_of
from common.compute.length_sums import LengthSums
from common.config import from_json, to_json
from common.data.cache import default_cache_dir
from common.data.loader import Loader
from common.data.streams import (
    Host,
    StagedLoader,
    open_tokenizer_of,
    open_training,
    open_training_text,
    open_validation,
)
from common.data.tokenizers.saved import saved_files
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from common.evals.decoding import greedy_decoder
from common.evals.measure import TextScore, TurnCost
from common.evals.text_metrics import ALL, score_texts
from common.files import read_json, read_rows, write_json, write_rows
from common.report.certificate import flatten
from common.report.results import ArmResult, Flops
from common.sharding.hosts import on_first_process
from common.train.config import only_how
from common.train.loop import Fitted, fit
from common.train.metrics_log import last_losses
from common.train.programs import Setup, check_rows, lower_step, make_programs
from common.train.run_files import RunFiles
from common.train.task import Task, Watcher
from experiments.config import Arm, Experiment
from experiments.families import builder
from experiments.models.initial import make_initial
from experiments.running.audit import count_step
from experiments.running.console import ProgressBars
from experiments.running.multi_turn import measure
from experiments.running.scored_splits import ScoredSplit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The one stream of an experiment."""

    content_id: str
    """Of the training text."""
    tokenizer: Tokenizer
    train: Loader | StagedLoader
    validation: Loader


def open_data(experiment: Experiment, arms: Iterable[str] | None = None) -> Data:
    """Builds, or finds in the cache, what the experiment trains on.

    Raises UserError where one of `arms` (None: any) has fewer rows in its table than the tokenizer needs.
    """
    cache_dir, config = default_cache_dir(), experiment.data
    source = open_training_text(config, cache_dir)
    tokenizer = open_tokenizer_of(config, source, cache_dir)
    for name in experiment.arms if arms is None else arms:
        rows = experiment.arms[name].model.vocab_size
        if rows < tokenizer.table_size:
            raise UserError(f"arms.{name}.model.vocab_size is {rows}; the tokenizer needs {tokenizer.table_size}")
    host = Host() if jax.process_count() == 1 else Host(_rows_here(experiment))
    return Data(
        content_id=source.content_id,
        tokenizer=tokenizer,
        train=open_training(config, tokenizer, cache_dir, host),
        validation=open_validation(config, tokenizer, cache_dir, host),
    )


def _rows_here(experiment: Experiment) -> list[int]:
    """Numbers of the rows of a batch that this process feeds; of all arms, which share a mesh."""
    arm = next(iter(experiment.arms.values()))
    setup = make_setup(experiment, arm)
    check_rows(setup)
    return make_programs(setup).local_rows


def make_setup(experiment: Experiment, arm: Arm) -> Setup:
    return Setup(
        build=builder(arm.model, experiment.train.execution),
        model=arm.model,
        train=experiment.train,
        learning_rate=arm.learning_rate,
        steps=experiment.steps(),
        row_slots=experiment.row_slots(),
    )


def make_task(experiment: Experiment, name: str, data: Data) -> Task:
    arm = experiment.arms[name]
    config, chip = to_json(experiment), chip_of(jax.devices()[0].device_kind)
    validation = data.validation.validation_batches(experiment.evaluation.validation_batches)
    return Task(
        setup=make_setup(experiment, arm),
        stream=data.train,
        seeker=data.train,
        validation=tuple(validation),
        config={"experiment": experiment.name, "arm": name, **config["arms"][name]}
        | {key: config[key] for key in ("data", "train")},
        data={"content_id": data.content_id, "tokenizer_hash": data.tokenizer.content_hash},
        tokenizer_files=saved_files(data.tokenizer),
        initial=make_initial(arm),
        peak_flops_per_second=None if chip is None else chip.flops_per_second,
    )


def train_arm(
    experiment: Experiment, name: str, data: Data, run_dir: Path, watcher: Watcher, profile_steps: int = 0
) -> Fitted:
    task = dataclasses.replace(make_task(experiment, name, data), profile_steps=profile_steps)
    return fit(task, run_dir / name, watcher)


def score_arm(
    experiment: Experiment,
    name: str,
    data: Data,
    tests: Mapping[str, ScoredSplit],
    fitted: Fitted,
    run_dir: Path,
    progress: ProgressBars,
) -> ArmResult:
    """Decodes the test splits and writes `samples.jsonl` and `result.json`; all processes decode, the first writes.

    The result is whole on disk before its FLOPs are audited, which only adds the count.
    """
    samples: list[dict[str, Any]] = []
    scores: list[TextScore] = []
    decode = greedy_decoder(
        fitted.model,
        fitted.params,
        fitted.mesh,
        data.tokenizer,
        rows=experiment.evaluation.rows,
        max_new_tokens=experiment.evaluation.max_new_tokens,
    )
    for split, test in tests.items():
        rows = _decode_split(name, split, test, decode, progress)
        predictions, targets = [row["prediction"] for row in rows], [row["target"] for row in rows]
        groups = [row["group"] for row in rows] if all(row["group"] is not None for row in rows) else None
        inputs = [row["inputs"] for row in rows]
        scores += score_texts(predictions, targets, groups, split, inputs=inputs, in_training=test.in_training)
        samples += rows
    turns = _multi_turn(experiment, name, fitted, progress)
    progress.say(f"{name}: counting the FLOPs of a step")

    def write() -> dict[str, Any]:
        result = _result(experiment, name, fitted, run_dir / name, tuple(scores))
        made_from = _made_from(experiment, make_task(experiment, name, data))
        result = dataclasses.replace(result, multi_turn=turns, made_from=made_from)
        write_rows(run_dir / name / RunFiles.SAMPLES, samples)
        write_json(run_dir / name / RunFiles.RESULT, to_json(result))
        count = count_step(make_setup(experiment, experiment.arms[name]))
        audited = to_json(dataclasses.replace(result, xla_flops_per_step=count.flops, why_not_counted=count.why_not))
        write_json(run_dir / name / RunFiles.RESULT, audited)
        return audited

    return from_json(ArmResult, on_first_process(write))


def finished(experiment: Experiment, name: str, data: Data, run_dir: Path) -> ArmResult | None:
    """The result of an arm that was trained to its last step and scored, by this very config on these data; else None.

    How a run is computed may have changed since: its result would be the same.
    """
    made_from = _made_from(experiment, make_task(experiment, name, data))

    def read() -> dict[str, Any] | None:
        arm_dir = run_dir / name
        try:
            described = read_json(arm_dir / RunFiles.RESULT)
            result, metrics = from_json(ArmResult, described), read_rows(arm_dir / RunFiles.METRICS)
            samples = len(read_rows(arm_dir / RunFiles.SAMPLES))
        except UserError:  # absent, damaged or of another version: it is made anew
            return None
        decoded = sum(score.examples for score in result.scores if score.group == ALL)
        current = (result.made_from, result.steps, samples) == (made_from, experiment.steps(), decoded)
        last = metrics[-1] if metrics else {}
        recorded = (last.get("step"), last.get("fingerprint")) == (result.steps, result.fingerprint)
        return described if current and recorded else None

    described = on_first_process(read)
    return None if described is None else from_json(ArmResult, described)


def _made_from(experiment: Experiment, task: Task) -> str:
    config = {path: value for path, value in flatten(task.config).items() if not only_how(path)}
    decides = {"config": config, "data": task.data, "evaluation": to_json(experiment.evaluation)}
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()


def _decode_split(
    name: str, split: str, test: ScoredSplit, decode: Callable[..., list[str]], progress: ProgressBars
) -> list[dict[str, Any]]:
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


def _multi_turn(experiment: Experiment, name: str, fitted: Fitted, progress: ProgressBars) -> tuple[TurnCost, ...]:
    plan = experiment.evaluation.multi_turn
    if plan is None:
        return ()
    progress.say(f"{name}: timing a conversation of {plan.turns} turns")
    with progress.bar("timing a conversation", plan.turns) as advance:
        model = experiment.arms[name].model
        return tuple(measure(model, fitted.model, fitted.params, fitted.mesh, plan, advance))


def _result(
    experiment: Experiment, name: str, fitted: Fitted, arm_dir: Path, scores: tuple[TextScore, ...]
) -> ArmResult:
    arm, done = experiment.arms[name], fitted.progress
    rows, input_length, target_length = experiment.row_slots()
    steps = done.consumed_batches
    step_flops = arm.model.flops(LengthSums.of_rows(rows, input_length, target_length))
    train_loss, validation_loss = last_losses(arm_dir, steps)
    return ArmResult(
        arm=name,
        parameters=arm.model.param_count(),
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


def compiled_step(experiment: Experiment, arm: Arm) -> jax.stages.Compiled:
    """The arm's training step, compiled ahead of time for the experiment's mesh; no data is needed."""
    setup = make_setup(experiment, arm)
    return lower_step(setup, make_programs(setup)).compile()
