"""What an experiment is: one data stream, one way to train, several arms."""

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Literal

from common.compute.ledger import FLOPS_TOLERANCE
from common.compute.length_sums import LengthSums
from common.compute.matching import matching_widths, unequal
from common.data.config import DataConfig
from common.data.objectives.config import Supervised
from common.errors import UserError, nearest
from common.files import plain_name
from common.infer.config import NewTokens
from common.ranges import MOST_STEPS, Count, Range, Rows, check_ranges
from common.train.config import InitFrom, InverseSqrt, TrainConfig
from experiments.families import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One side of a comparison; everything else is shared."""

    model: ModelConfig
    learning_rate: Annotated[float, Range(0, 1000, "(]")]
    """Peak (the base of `InverseSqrt`), from the sweep in the experiment's file."""
    init: InitFrom | None = None
    """What its parameters begin as; None: a fresh model."""
    about: str = ""
    """What this arm stands for, shown beside its results."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiTurn:
    """A conversation whose cost is measured: what each turn must read before it can answer (random tokens)."""

    turns: Annotated[int, Range(1, 1024, unit="turns")]
    message_tokens: NewTokens
    reply_tokens: NewTokens
    repeats: Count
    """Timings a turn, of which the median counts."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Decoded text against its references, after training."""

    splits: tuple[str, ...]
    examples: Count
    """At most so many of each split, evenly spaced over it."""
    rows: Rows
    """Examples decoded at a time."""
    max_new_tokens: NewTokens
    validation_batches: Annotated[int, Range(1, 10**6, unit="batches")]
    """Batches of the validation split that a validation loss is taken over."""
    headline: Literal["exact_match", "bleu"] = "exact_match"
    """The score that stands first in the report."""
    multi_turn: MultiTurn | None = None

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    name: str
    question: str
    expected: str
    """What the experiment's author saw, and on what machine."""
    varies: tuple[str, ...] = ()
    """Fields of an arm that the comparison is about, such as `model.memory`; sizes and learning rates may differ
    always, anything else may not."""
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
                "leaves no inputs and targets of records to decode and to compare; nearest: evaluation.splits=[]"
            )
        if (steps := self.steps()) > MOST_STEPS:
            budget = f"{self.train.budget.amount:g} {self.train.budget.unit}"
            raise UserError(f"train.budget is {budget}, which are {steps:,} steps: at most {MOST_STEPS:,} are made")

    def check_arms(self, arms: Iterable[str]) -> None:
        """Raises UserError where one of these arms' models cannot hold the tokenizer's ids or the rows' positions."""
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
        """Rows, input slots, target slots of one batch."""
        return self.data.rows, self.data.input_length, self.data.target_length

    def flops_per_step(self, arm: Arm) -> int:
        """Training FLOPs of a padded batch (full attention)."""
        return arm.model.flops(self._text()).train_full_attention

    def remarks(self) -> list[str]:
        """One line for each thing that is allowed and seldom meant; said before anything is trained."""
        found = []
        if (apart := unequal(self._models(), self._text())) is not None:
            found.append(f"{apart} (the certificate allows {FLOPS_TOLERANCE:.0%})")
        steps, schedule = self.steps(), self.train.schedule
        if not isinstance(schedule, InverseSqrt) and schedule.warmup_steps >= steps:  # the warm-up of which rises
            reached = steps / (schedule.warmup_steps + 1)
            found.append(
                f"train.schedule.warmup_steps is {schedule.warmup_steps} and the run has {steps} steps: the learning "
                f"rate ends at {reached:.1%} of its peak"
            )
        return found

    def matching(self, reference: str) -> list[str]:
        """Overrides that give the other arms as many training FLOPs as `reference`, by their `d_ff`.

        Raises UserError where there is no such arm, or no such `d_ff`.
        """
        if reference not in self.arms:
            raise UserError(f"--match {reference!r} is no arm: {nearest(reference, self.arms)}")
        widths = matching_widths(self._models(), reference, self._text())
        return [f"arms.{name}.model.d_ff={width}" for name, width in widths.items()]

    def _models(self) -> dict[str, ModelConfig]:
        return {name: arm.model for name, arm in self.arms.items()}

    def _text(self) -> LengthSums:
        """The length sums of a padded batch."""
        return LengthSums.of_rows(*self.row_slots())

    def steps(self) -> int:
        """The same for every arm; a budget in FLOPs is that of the arm that costs most."""
        rows, input_length, target_length = self.row_slots()
        dearest = max(self.flops_per_step(arm) for arm in self.arms.values())
        return self.train.budget.steps(rows * (input_length + target_length), dearest)
