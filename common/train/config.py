"""How a run trains: budget, optimizer, schedule, mesh, checkpoints. Plain configs that need no JAX."""

import dataclasses
import math
from typing import Annotated, Literal

from common.errors import UserError
from common.ranges import MOST_STEPS, Count, Every, Positive, Range, Seconds, Seed, Share, Steps, Tiny, check_ranges
from common.recipe import CompleteP, Execution, Recipe
from common.sharding.shape import MeshShape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Warm-up, then a straight line down to `final_fraction` of the peak right after the last step."""

    kind: Literal["linear"] = "linear"
    warmup_steps: Steps = 0
    final_fraction: Share = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Warm-up, then half a cosine down to `final_fraction` of the peak (arXiv 1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Steps = 0
    final_fraction: Share = 0.1

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD:
    """Warm-up, stable, then linear decay over the last `decay_fraction` of the steps (arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: Steps = 0
    decay_fraction: Annotated[float, Range(0, 1, "(]")] = 0.2
    final_fraction: Share = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """T5's pretraining schedule: base / sqrt(max(step, warmup_steps)), constant during warm-up.

    The base is the run's learning rate. With a base of 1.0 and the defaults, the rate is 0.01 for the first 10,000
    steps (arXiv 1910.10683, section 3.1.2; T5X's `constant * rsqrt_decay`). The schedule suits Adafactor, whose rates
    are relative to the parameters.
    """

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup_steps: Annotated[int, Range(1, MOST_STEPS, unit="steps")] = 10_000

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """Warm-up, then the peak until the end; T5 is fine-tuned this way (at 0.001, without warm-up)."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Steps = 0

    def __post_init__(self) -> None:
        check_ranges(self)


Schedule = Linear | Cosine | WSD | InverseSqrt | Constant


AverageDecay = Annotated[float, Range(0, 1, "[)")]
"""Decay factor of a running average: the share of its old value that the average keeps at each step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101) with clipping by global norm; weight decay applies to matrices, not norms and biases."""

    kind: Literal["adamw"] = "adamw"
    b1: AverageDecay = 0.9
    b2: AverageDecay = 0.95
    epsilon: Tiny = 1e-8
    weight_decay: Annotated[float, Range(0, 1000)] = 0.1
    clip_norm: Positive | None = 1.0
    """Clips the gradient's norm over all parameters; None for no clipping."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Adafactor (arXiv 1804.04235) as in T5X: no momentum, no weight decay, rates relative to each parameter's RMS.

    Second moments of matrices are kept as row and column means, by logical axes and separately for each layer.
    """

    kind: Literal["adafactor"] = "adafactor"
    decay_exponent: Annotated[float, Range(0, 1, "(]")] = 0.8
    """Second moments decay by 1 - (t + 1)^-decay_exponent at step t = 0, 1, ..."""
    clip_update_rms: Positive = 1.0
    """Scales down an update whose RMS, before the learning rate, is larger."""
    epsilon: Tiny = 1e-30
    """Added to squared gradients."""
    min_scale: Tiny = 1e-3
    """A parameter whose RMS is smaller counts as having this one."""
    min_factored: Annotated[int, Range(0, 10**9)] = 128
    """Matrices with fewer rows or columns than this are not factored."""
    clip_norm: Positive | None = None
    """Clips the gradient's norm over all parameters; None for no clipping, as in T5."""

    def __post_init__(self) -> None:
        check_ranges(self)


Optimizer = AdamW | Adafactor


def check_optimizer(optimizer: Optimizer, recipe: Recipe) -> None:
    """Raises UserError if the recipe's parametrization has no rule for this optimizer.

    CompleteP's rates are for updates whose size does not depend on the parameter's, as Adam's. Adafactor's are relative
    to the parameter's size, which is another rule of its own.
    """
    if isinstance(recipe.parametrization, CompleteP) and not isinstance(optimizer, AdamW):
        raise UserError(
            f"train.optimizer.kind is {optimizer.kind!r}: model.recipe.parametrization {recipe.parametrization.kind!r} "
            "has rules for 'adamw' only; nearest: train.optimizer.kind=adamw"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train. Arms that a study claims to train for equal steps all take those of the most expensive arm."""

    unit: Literal["steps", "tokens", "flops"]
    """`tokens` are input and target slots, as in batch size x length; `flops` are training FLOPs (full attention,
    padding included)."""
    amount: Annotated[float, Range(0, 1e30, "(]")]

    def __post_init__(self) -> None:
        check_ranges(self)

    def steps(self, tokens_per_step: int, flops_per_step: int) -> int:
        """Returns how many whole steps the budget pays for, at least one."""
        match self.unit:
            case "steps":
                return math.ceil(self.amount)
            case "tokens":
                return max(1, int(self.amount // tokens_per_step))
            case "flops":
                return max(1, int(self.amount // flops_per_step))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fresh:
    """Initialises the parameters that match `leaves`, whether the source has them or not."""

    kind: Literal["fresh"] = "fresh"
    leaves: str
    """Pattern of the new model's parameters, such as `output.*`; `*` matches dots too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rename:
    """Loads the parameters that match `leaves` from those with another name in the source."""

    kind: Literal["rename"] = "rename"
    leaves: str
    """Pattern of the new model's parameters, with at most one `*`."""
    source: str
    """Their names in the source; its `*` stands for whatever the `*` of `leaves` matched."""

    def __post_init__(self) -> None:
        if self.leaves.count("*") > 1 or self.leaves.count("*") != self.source.count("*"):
            raise UserError(f"rename {self.leaves!r} from {self.source!r}: both must have one '*', or neither")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize:
    """Loads the parameters that match `leaves`, whose length along one axis differs in the source.

    The overlap is copied, for example the first rows of a larger table. The rest of the
    new model's array is initialised; the rest of the source's is not used.
    """

    kind: Literal["resize"] = "resize"
    leaves: str
    """Pattern of the new model's parameters."""
    axis: str = "vocab"
    """Logical name of the axis."""


InitRule = Fresh | Rename | Resize


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Loads a new run's parameters from a checkpoint, by name, with rules for those that differ."""

    path: str
    """A model folder, an arm's run directory, `DIRECTORY@STEP`, or a checkpoint's directory."""
    rules: tuple[InitRule, ...] = ()
    tokenizer: Literal["same", "any"] = "same"
    """`same` refuses a model with another tokenizer, unless all its tables are initialised; `any` accepts it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anomalies:
    """What to do about a step whose loss or gradient is not finite, or whose loss is a spike.

    `stop` ends the run. `skip` leaves the parameters unchanged and continues with the next batch. `roll_back` restores
    the last checkpoint from before the batches to skip, and skips them when training gets there again (arXiv
    2204.02311, section 5.1). Skipped batches do not enter the chained fingerprint.
    """

    on_nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
    on_spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    spike_deviations: Positive = 10.0
    """A loss is a spike if it is more than this many standard deviations above the median of the losses before it. The
    standard deviation is estimated as 1.4826 times the median absolute deviation, which ignores earlier spikes."""
    spike_window: Annotated[int, Range(1, 10**6, unit="steps")] = 100
    """How many earlier losses to compare with; while there are fewer, no loss is a spike."""
    rolled_back: Count = 1
    """How many batches `roll_back` skips, the last of them the anomalous one; PaLM's authors skipped 200 to 500."""
    max_in_a_row: Count = 10
    """The run stops rather than skip more consecutive batches than this."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_in_a_row < self.rolled_back:
            raise UserError(
                f"max_in_a_row is {self.max_in_a_row}: it must be at least rolled_back ({self.rolled_back})"
            )

    @property
    def rolls_back(self) -> bool:
        return "roll_back" in (self.on_nonfinite, self.on_spike)

    @property
    def guards_step(self) -> bool:
        """Whether the step itself must be able to keep the parameters unchanged."""
        return "skip" in (self.on_nonfinite, self.on_spike)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a run waits, in seconds, for what it does not control; no result depends on it."""

    storage_seconds: Seconds = 600.0
    """How long to retry, with growing pauses, when a full disk or a busy bucket refuses."""
    stall_seconds: Seconds = 1800.0
    """A run without progress for this long is ended. Compiling, restoring, a step, a validation or a save must each
    take less."""
    preemption_seconds: Seconds = 25.0
    """How long after SIGTERM the process is ended, even if the current step is not saved; clouds allow 30 seconds."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.stall_seconds <= self.storage_seconds:  # or waiting for storage would count as a stall
            raise UserError(f"stall_seconds is {self.stall_seconds}: it must be more than storage_seconds")


def only_how(path: str) -> bool:
    """Returns whether the field at a dotted path of a resolved config only decides how the same training is computed.

    A later launch of a run may change such a field, for example for other devices, and the arms of a comparison may
    differ in it. The results then differ by rounding and, if `accumulation` changes, in which units dropout drops.
    Precision is no such field.

    >>> [only_how(path) for path in ("train.mesh.fsdp", "train.execution.remat", "train.execution.dtype", "train.seed")]
    [True, True, False, False]
    """
    prefixes = ("train.mesh.", "train.sharding", "train.accumulation", "train.execution.")
    return path.startswith(prefixes) and path not in ("train.execution.dtype", "train.execution.matmul_precision")


def only_watches(path: str) -> bool:
    """Returns whether no result depends on the field at a dotted path of a resolved config: prose, evaluation, saves.

    >>> [only_watches(path) for path in ("train.validate_every", "evaluation.examples", "labels.width", "train.seed")]
    [True, True, True, False]
    """
    fields = ("about", "after.arm", "after.run", "train.validate_every", "train.checkpoint_every", "train.keep_last")
    return path in fields or path.startswith(("labels", "evaluation", "train.patience."))


def decides_result(path: str) -> bool:
    """Returns whether runs that differ in the field at a dotted path of a resolved config are different runs."""
    return not (only_how(path) or only_watches(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides how a model is trained, except for the data and the learning rate."""

    budget: Budget
    optimizer: Optimizer = AdamW()
    schedule: Schedule
    accumulation: Count = 1
    """Micro-batches per step; the gradient is that of the whole batch, weighted by the loss weights."""
    seed: Seed = 0
    """Seed of initialisation and dropout. The data's order has `data.seed`; an independent repetition changes both."""
    validate_every: Every
    """Steps between validation losses; there is always one after the last step."""
    checkpoint_every: Every
    """Steps between checkpoints; there is always one after the last step."""
    keep_last: Count = 2
    """How many of the newest checkpoints to keep, besides the best one."""
    mesh: MeshShape = MeshShape()
    sharding: Literal["fsdp", "sequence"] = "fsdp"
    """The sharding rules (`common.sharding.rules`). `sequence` also shards activations between a layer's matrix
    products over `tensor`: less memory, the same traffic."""
    execution: Execution = Execution()
    anomalies: Anomalies = Anomalies()
    patience: Patience = Patience()

    def __post_init__(self) -> None:
        check_ranges(self)
        rolled_back = self.anomalies.rolled_back
        if self.anomalies.rolls_back and (rolled_back > self.checkpoint_every or self.keep_last < 2):
            raise UserError(
                f"anomalies.rolled_back is {rolled_back} with checkpoint_every {self.checkpoint_every} and keep_last "
                f"{self.keep_last}: rolled_back must be at most checkpoint_every, and keep_last at least 2"
            )
