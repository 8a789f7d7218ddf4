"""The config of an experiment: one data stream, one way to train, several arms."""

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from common.compute.ledger import FLOPS_TOLERANCE
from common.compute.length_sums import LengthSums
from common.compute.matching import matching_widths, unequal
from common.config import from_earlier_json, to_json
from common.data.config import DataConfig
from common.data.objectives.config import Supervised
from common.errors import UserError, nearest
from common.files import plain_name
from common.infer.config import NewTokens
from common.ranges import MOST_STEPS, Count, Range, Rows, check_ranges
from common.train.config import InitFrom, InverseSqrt, TrainConfig
from experiments.families import ModelConfig

LearningRate = Annotated[float, Range(0, 1000, "(]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison; all arms share everything else."""

    model: ModelConfig
    learning_rate: LearningRate
    """Peak learning rate (the base of `InverseSqrt`), from the sweep in the experiment's file."""
    init: InitFrom | None = None
    """The model whose parameters it starts from; None: a fresh model."""
    about: str = ""
    """What this arm stands for, shown with its results."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One arm with everything that it shares with the others: `config.json` in its run directory."""

    experiment: str
    arm: str
    model: ModelConfig
    learning_rate: LearningRate
    init: InitFrom | None = None
    about: str = ""
    data: DataConfig
    train: TrainConfig


def complete_run_config(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON of a `RunConfig` that an earlier version wrote, with the fields that have been added since."""
    return to_json(from_earlier_json(RunConfig, stored))


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
    """Decodes texts after training and compares them with their references."""

    splits: tuple[str, ...]
    examples: Count
    """Maximum number per split, evenly spaced over the split."""
    rows: Rows
    """Examples per decoded batch."""
    max_new_tokens: NewTokens
    validation_batches: Annotated[int, Range(1, 10**6, unit="batches")]
    """Batches of the validation split that the validation loss averages over."""
    headline: Literal["exact_match", "bleu"] = "exact_match"
    """The score that the report shows first."""
    multi_turn: MultiTurn | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A comparison of arms that share data, training and evaluation."""

    name: str
    question: str
    expected: str
    """What the experiment's author saw, and on what machine."""
    varies: tuple[str, ...] = ()
    """Fields of an arm that may differ because the comparison is about them, such as `model.memory`.

    Sizes and learning rates may always differ, other fields never."""
    data: DataConfig
    train: TrainConfig
    evaluation: Evaluation
    arms: dict[str, Arm]

    def __post_init__(self) -> None:
        if not self.arms:
            raise UserError(f"experiment {self.name!r} has no arms")
        for name in self.arms:
            plain_name(name, "arms")
        if self.evaluation.splits and not isinstance(self.data.objective, Supervised):
            raise UserError(
                f"evaluation.splits is {list(self.evaluation.splits)}, but objective {self.data.objective.kind!r} "
                "keeps no inputs and targets of records to decode and compare; nearest: evaluation.splits=[]"
            )
        if (steps := self.steps()) > MOST_STEPS:
            budget = f"{self.train.budget.amount:g} {self.train.budget.unit}"
            raise UserError(f"train.budget is {budget}, that is {steps:,} steps; the most is {MOST_STEPS:,}")

    def run_config(self, name: str) -> RunConfig:
        """Returns everything that decides the result of the arm `name`, and how it is computed."""
        arm = self.arms[name]
        return RunConfig(
            experiment=self.name,
            arm=name,
            model=arm.model,
            learning_rate=arm.learning_rate,
            init=arm.init,
            about=arm.about,
            data=self.data,
            train=self.train,
        )

    def check_arms(self, arms: Iterable[str]) -> None:
        """Raises UserError where an arm's model has too few token rows or positions for the data."""
        tokenizer = self.data.tokenizer
        for name in arms:
            model = self.arms[name].model
            longest = self.data.input_length + self.data.target_length
            if model.max_positions is not None and model.max_positions < longest:
                raise UserError(
                    f"arms.{name}.model.max_positions is {model.max_positions}: rows are {longest} long; "
                    f"nearest: {longest}"
                )
            if tokenizer.path is None and model.vocab_size < tokenizer.vocab_size:
                raise UserError(
                    f"arms.{name}.model.vocab_size is {model.vocab_size}, less than the tokenizer's "
                    f"{tokenizer.vocab_size}; nearest: {-(-tokenizer.vocab_size // 128) * 128}"
                )

    def row_slots(self) -> tuple[int, int, int]:
        """Returns (rows, input slots per row, target slots per row) of a batch."""
        return self.data.rows, self.data.input_length, self.data.target_length

    def flops_per_step(self, arm: Arm) -> int:
        """Returns the training FLOPs of one padded batch, counting full attention."""
        return arm.model.flops(self._length_sums()).train_full_attention

    def remarks(self) -> list[str]:
        """Returns a warning for each setting that is allowed but rarely intended."""
        warnings = []
        if (apart := unequal(self._models(), self._length_sums())) is not None:
            warnings.append(f"{apart} (the certificate allows {FLOPS_TOLERANCE:.0%})")
        steps, schedule = self.steps(), self.train.schedule
        if not isinstance(schedule, InverseSqrt) and schedule.warmup_steps >= steps:
            reached = steps / (schedule.warmup_steps + 1)
            warnings.append(
                f"train.schedule.warmup_steps is {schedule.warmup_steps} and the run has {steps} steps: the learning "
                f"rate ends at {reached:.1%} of its peak"
            )
        return warnings

    def matching(self, reference: str) -> list[str]:
        """Returns overrides of `d_ff` that give the other arms as many training FLOPs as the arm `reference`.

        Raises UserError for an unknown arm, and where no `d_ff` matches.
        """
        if reference not in self.arms:
            raise UserError(f"--match {reference!r} is no arm: {nearest(reference, self.arms)}")
        widths = matching_widths(self._models(), reference, self._length_sums())
        return [f"arms.{name}.model.d_ff={width}" for name, width in widths.items()]

    def _models(self) -> dict[str, ModelConfig]:
        return {name: arm.model for name, arm in self.arms.items()}

    def _length_sums(self) -> LengthSums:
        """Returns the length sums of a padded batch."""
        return LengthSums.of_rows(*self.row_slots())

    def steps(self) -> int:
        """Returns the number of steps, the same for every arm: a budget in FLOPs is spent by the most expensive arm."""
        rows, input_length, target_length = self.row_slots()
        step_flops = max(self.flops_per_step(arm) for arm in self.arms.values())
        return self.train.budget.steps(rows * (input_length + target_length), step_flops)
