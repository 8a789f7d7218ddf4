"""How a run trains: budget, optimizer, schedule, mesh, checkpoints. Plain configs, no JAX needed to read them."""

import dataclasses
import math
from typing import Annotated, Literal

from common.errors import UserError
from common.ranges import MOST_STEPS, Count, Every, Positive, Range, Seconds, Seed, Share, Steps, Tiny, check_ranges
from common.recipe import Execution
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
    """T5's pretraining schedule: base / sqrt(max(step, warmup_steps)), flat at first, without a rise.

    With the defaults and a learning rate (the base) of 1.0 it is 0.01 for 10,000 steps (arXiv 1910.10683, section
    3.1.2; T5X's `constant * rsqrt_decay`). It is made for Adafactor, whose rates are relative to the parameters.
    """

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup_steps: Annotated[int, Range(1, MOST_STEPS, unit="steps")] = 10_000

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """Warm-up, then the peak to the end: how T5 is fine-tuned (at 0.001, without warm-up)."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Steps = 0

    def __post_init__(self) -> None:
        check_ranges(self)


Schedule = Linear | Cosine | WSD | InverseSqrt | Constant


Average = Annotated[float, Range(0, 1, "[)")]
"""The share of itself that a running average keeps at each step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101) with global-norm clipping; decay acts on matrices, not on norms and biases."""

    kind: Literal["adamw"] = "adamw"
    b1: Average = 0.9
    b2: Average = 0.95
    epsilon: Tiny = 1e-8
    weight_decay: Annotated[float, Range(0, 1000)] = 0.1
    clip_norm: Positive | None = 1.0
    """The gradient norm over all parameters; None: it is not clipped."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Adafactor (arXiv 1804.04235) as T5X has it: no momentum, no weight decay, rates relative to each parameter's RMS.

    Second moments of matrices are kept as row and column means, by logical axes and for each layer apart.
    """

    kind: Literal["adafactor"] = "adafactor"
    decay_exponent: Annotated[float, Range(0, 1, "(]")] = 0.8
    """Second moments decay by 1 - (t + 1)^-decay_exponent at step t = 0, 1, ..."""
    clip_update_rms: Positive = 1.0
    epsilon: Tiny = 1e-30
    """Added to squared gradients."""
    min_scale: Tiny = 1e-3
    """Least RMS that a parameter counts as having."""
    min_factored: Annotated[int, Range(0, 10**9)] = 128
    """Matrices with fewer rows or columns keep their second moments whole."""
    clip_norm: Positive | None = None
    """Of the gradient over all parameters; T5 has none."""

    def __post_init__(self) -> None:
        check_ranges(self)


Optimizer = AdamW | Adafactor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train; every arm of a comparison takes the same number of steps."""

    unit: Literal["steps", "tokens", "flops"]
    """`tokens` are slots of input and target, as batch size x length is usually counted; `flops` are training FLOPs of
    the arm that costs most (full attention, padding included)."""
    amount: Annotated[float, Range(0, 1e30, "(]")]

    def __post_init__(self) -> None:
        check_ranges(self)

    def steps(self, tokens_per_step: int, flops_per_step: int) -> int:
        """Whole steps that the budget pays for, at least one."""
        match self.unit:
            case "steps":
                return math.ceil(self.amount)
            case "tokens":
                return max(1, int(self.amount // tokens_per_step))
            case "flops":
                return max(1, int(self.amount // flops_per_step))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fresh:
    """These parameters begin as a new model's do, whether the source has them or not."""

    kind: Literal["fresh"] = "fresh"
    leaves: str
    """Pattern of the new model's parameters, as `output.*`; `*` also stands for dots."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rename:
    """These parameters have another name in the source."""

    kind: Literal["rename"] = "rename"
    leaves: str
    """Pattern of the new model's parameters, with at most one `*`."""
    source: str
    """Their names in the source; its `*` stands for what that of `leaves` stands for."""

    def __post_init__(self) -> None:
        if self.leaves.count("*") > 1 or self.leaves.count("*") != self.source.count("*"):
            raise UserError(f"rename {self.leaves!r} from {self.source!r}: both take one '*', or neither has any")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resize:
    """These parameters have another length along one axis: what both have is taken from the source, the first rows of a
    larger table for example; what the new model has beyond that begins fresh, what the source has is left.
    """

    kind: Literal["resize"] = "resize"
    leaves: str
    """Pattern of the new model's parameters."""
    axis: str = "vocab"
    """Logical name of the axis."""


InitRule = Fresh | Rename | Resize


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """What a new run's parameters begin as: those of a checkpoint, by name, with rules for what differs."""

    path: str
    """A model folder, or a run: an arm's directory, `DIRECTORY@STEP`, or a checkpoint's directory."""
    rules: tuple[InitRule, ...] = ()
    tokenizer: Literal["same", "any"] = "same"
    """`same` refuses a model whose tokenizer is another one, unless all its tables begin fresh; `any` takes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anomalies:
    """What becomes of a step whose loss or gradient is not finite, or whose loss leaps.

    `stop` ends the run. `skip` leaves the parameters as they were, and goes on with the next batch. `roll_back` goes
    back to the last checkpoint from before the batches that are to be left out, and passes over them on the way (arXiv
    2204.02311, section 5.1). No batch that was left out enters the chained fingerprint.
    """

    on_nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
    on_spike: Literal["ignore", "stop", "skip", "roll_back"] = "ignore"
    spike_deviations: Positive = 10.0
    """A loss is a spike above the median of those before it by this many standard deviations (1.4826 times the median
    absolute deviation, which is the standard deviation of normal numbers and takes no notice of spikes)."""
    spike_window: Annotated[int, Range(1, 10**6, unit="steps")] = 100
    """How many losses before it are looked at; as long as there are fewer nothing is a spike."""
    rolled_back: Count = 1
    """Batches that `roll_back` leaves out, the one that was noticed the last; PaLM's authors took 200 to 500."""
    max_in_a_row: Count = 10
    """The run stops before it leaves out more batches than this without one in between that was learnt from."""

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
        """Whether the step itself has to keep the parameters as they were."""
        return "skip" in (self.on_nonfinite, self.on_spike)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a run waits for the world outside, in seconds; no result depends on it."""

    storage_seconds: Seconds = 600.0
    """A full disk or a bucket that refuses is tried again, ever less often, for so long."""
    stall_seconds: Seconds = 1800.0
    """Longer than compiling, restoring, a step, a validation or a save may take; a run that hangs so long is ended."""
    preemption_seconds: Seconds = 25.0
    """From SIGTERM to the end, whether the step at hand could be saved or not; clouds give 30."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.stall_seconds <= self.storage_seconds:  # which would be taken for a stall
            raise UserError(f"stall_seconds is {self.stall_seconds}: it must be more than storage_seconds")


def only_how(path: str) -> bool:
    """Whether a field of a resolved config, by its dotted path, says only how the same training is computed.

    A later launch of a run may have another value, as for other devices than before, and a comparison's arms may: what
    differs is rounding and, where `accumulation` moves, which units dropout leaves out. Precision is no such field.

    >>> [only_how(path) for path in ("train.mesh.fsdp", "train.execution.remat", "train.execution.dtype", "train.seed")]
    [True, True, False, False]
    """
    prefixes = ("train.mesh.", "train.sharding", "train.accumulation", "train.execution.", "train.patience.")
    return path.startswith(prefixes) and path not in ("train.execution.dtype", "train.execution.matmul_precision")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    budget: Budget
    optimizer: Optimizer = AdamW()
    schedule: Schedule
    accumulation: Count = 1
    """Micro-batches a step; the gradient is that of the whole batch, weighed by loss weights."""
    seed: Seed = 0
    """The seed of initialisation and dropout. Data order uses `data.seed`: a repetition that shares nothing by chance
    with another run moves both."""
    validate_every: Every
    """Steps between validation losses; one is always taken at the end."""
    checkpoint_every: Every
    keep_last: Count = 2
    """Checkpoints kept beside the best one."""
    mesh: MeshShape = MeshShape()
    sharding: Literal["fsdp", "sequence"] = "fsdp"
    """The table by which arrays lie on the mesh (`common.sharding.rules`); `sequence` divides what lies between a
    layer's products by `tensor` too: less memory, the same traffic."""
    execution: Execution = Execution()
    anomalies: Anomalies = Anomalies()
    patience: Patience = Patience()

    def __post_init__(self) -> None:
        check_ranges(self)
        many = self.anomalies.rolled_back
        if self.anomalies.rolls_back and (many > self.checkpoint_every or self.keep_last < 2):
            raise UserError(
                f"anomalies.rolled_back is {many} with checkpoint_every {self.checkpoint_every} and keep_last "
                f"{self.keep_last}: it must be at most checkpoint_every, and keep_last 2 or more"
            )
