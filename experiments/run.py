"""A run: everything that decides one trained model, and how it is computed and watched."""

import dataclasses
import hashlib
import json
from typing import Annotated, Any, Literal

from common.config import dotted_fields, from_earlier_json, to_json, without_defaults
from common.data.config import DataConfig
from common.data.objectives.config import Supervised
from common.errors import UserError
from common.infer.config import NewTokens
from common.ranges import MOST_STEPS, Count, Range, Rows, check_ranges
from common.train.config import InitFrom, InitRule, InverseSqrt, TrainConfig, check_optimizer, decides_result
from experiments.families import ModelConfig

LearningRate = Annotated[float, Range(0, 1000, "(]")]
Label = str | int | float
"""The value of a label, such as a family's name or a width."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTurn:
    """Measures the cost of a conversation of random tokens: what each turn must read before it can answer."""

    turns: Annotated[int, Range(1, 1024, unit="turns")]
    message_tokens: NewTokens
    reply_tokens: NewTokens
    repeats: Count
    """Timings per turn; the median counts."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Decodes texts after training and compares them with their references. No trained model depends on it."""

    splits: tuple[str, ...] = ()
    examples: Count = 1000
    """Maximum number per split, evenly spaced over the split."""
    rows: Rows = 64
    """Examples per decoded batch."""
    max_new_tokens: NewTokens = 64
    validation_batches: Annotated[int, Range(1, 10**6, unit="batches")] = 32
    """Batches of the validation split that the validation loss averages over."""
    headline: Literal["exact_match", "bleu"] = "exact_match"
    """The score that the report shows first."""
    multi_turn: MultiTurn | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class After:
    """Starts from the parameters of another arm of the study, of the same seed, once that one is trained."""

    arm: str
    rules: tuple[InitRule, ...] = ()
    run: str = ""
    """Name of the run that it starts from; a study sets it for each seed."""
    identity: str = ""
    """Identity of that run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training: everything that decides its result (`identity`), how it is computed, and how it is watched."""

    model: ModelConfig
    learning_rate: LearningRate
    """Peak learning rate (the base of `InverseSqrt`)."""
    init: InitFrom | None = None
    """The model on disk whose parameters it starts from."""
    after: After | None = None
    """The run of the same study whose parameters it starts from. With neither, the model is fresh."""
    data: DataConfig
    train: TrainConfig
    evaluation: Evaluation = Evaluation()
    labels: dict[str, Label] = dataclasses.field(default_factory=dict)
    """What tables and comparisons group by, such as {"family": "gpt", "width": 128}."""
    about: str = ""
    """What this run stands for, shown with its results."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_optimizer(self.train.optimizer, self.model.recipe)
        if self.init is not None and self.after is not None:
            raise UserError(f"starts both from init.path {self.init.path!r} and after {self.after.arm!r}: choose one")
        if self.evaluation.splits and not isinstance(self.data.objective, Supervised):
            raise UserError(
                f"evaluation.splits is {list(self.evaluation.splits)}, but objective {self.data.objective.kind!r} "
                "keeps no inputs and targets of records to decode and compare; nearest: evaluation.splits=[]"
            )
        if (steps := self.steps) > MOST_STEPS:
            budget = f"{self.train.budget.amount:g} {self.train.budget.unit}"
            raise UserError(f"train.budget is {budget}, that is {steps:,} steps; the most is {MOST_STEPS:,}")

    @property
    def row_slots(self) -> tuple[int, int, int]:
        """(rows of a batch, input slots per row, target slots per row)."""
        return self.data.rows, self.data.input_length, self.data.target_length

    @property
    def flops_per_step(self) -> int:
        """Training FLOPs of one padded batch, counting full attention."""
        return self.model.flops(self.data.length_sums).train_full_attention

    @property
    def steps(self) -> int:
        """The number of training steps that its budget pays for."""
        rows, input_length, target_length = self.row_slots
        return self.train.budget.steps(rows * (input_length + target_length), self.flops_per_step)

    def check(self, name: str) -> None:
        """Raises UserError where the model has too few token rows or positions for the data. `name`: its arm's."""
        tokenizer, longest = self.data.tokenizer, self.data.input_length + self.data.target_length
        if self.model.max_positions is not None and self.model.max_positions < longest:
            raise UserError(
                f"arms.{name}.model.max_positions is {self.model.max_positions}: rows are {longest} long; "
                f"nearest: {longest}"
            )
        if tokenizer.path is None and self.model.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"arms.{name}.model.vocab_size is {self.model.vocab_size}, less than the tokenizer's "
                f"{tokenizer.vocab_size}; nearest: {-(-tokenizer.vocab_size // 128) * 128}"
            )

    def remark(self) -> str | None:
        """Returns a warning about a warm-up that the run does not finish; None if it does."""
        schedule = self.train.schedule
        if isinstance(schedule, InverseSqrt) or schedule.warmup_steps < self.steps:
            return None
        reached = self.steps / (schedule.warmup_steps + 1)
        return (
            f"train.schedule.warmup_steps is {schedule.warmup_steps} and the run has {self.steps} steps: the learning "
            f"rate ends at {reached:.1%} of its peak"
        )


def identity(run: Run) -> str:
    """Returns a hash of the fields that decide the trained model, hexadecimal.

    Fields at their defaults do not enter it, so that a field added later changes no identity. How a run is computed,
    how it is watched, labels and prose do not enter it either. What the data and `init.path` hold is not known here: a
    run directory records hashes of it apart, and refuses other data and other weights.
    """
    fields = {path: value for path, value in dotted_fields(without_defaults(run)).items() if decides_result(path)}
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=8).hexdigest()


def made_from(run: Run) -> str:
    """Returns a hash of what decides a run's result: its identity and what is evaluated.

    Fields at their defaults do not enter it, so that a field added later does not make finished work be done again.
    """
    decides = {"run": identity(run), "evaluation": without_defaults(run.evaluation)}
    return hashlib.blake2b(json.dumps(decides, sort_keys=True).encode(), digest_size=16).hexdigest()


def restore_run(stored: dict[str, Any]) -> Run:
    """Restores a run from the JSON that this or an earlier version wrote; fields added since take their defaults.

    Earlier versions also wrote the names of the experiment and the arm.
    """
    return from_earlier_json(Run, {key: value for key, value in stored.items() if key not in ("experiment", "arm")})


def complete_run(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON of `restore_run`'s run, with every field of today's version."""
    return to_json(restore_run(stored))
