"""How a run trains: budget, optimizer, schedule, mesh, checkpoints. Plain configs, no JAX needed to read them."""

import dataclasses
import math
from typing import Literal

from common.errors import UserError
from common.nn.recipe import Execution


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Warm-up, then a straight line down to `final_fraction` of the peak at the last step."""

    kind: Literal["linear"] = "linear"
    warmup_steps: int = 0
    final_fraction: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Warm-up, then half a cosine down to `final_fraction` of the peak (arXiv 1608.03983)."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD:
    """Warm-up, stable, then linear decay over the last `decay_fraction` of the steps (arXiv 2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    final_fraction: float = 0.0


Schedule = Linear | Cosine | WSD


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (arXiv 1711.05101) with global-norm clipping; decay acts on matrices, not on norms and biases."""

    kind: Literal["adamw"] = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How long to train; every arm of a comparison takes the same number of steps."""

    unit: Literal["steps", "tokens", "flops"]
    """`tokens` are slots of input and target, as batch size x length is usually counted; `flops` are training FLOPs of
    the arm that costs most (full attention, padding included)."""
    amount: float

    def __post_init__(self) -> None:
        if not (self.amount > 0 and math.isfinite(self.amount)):
            raise UserError(f"amount is {self.amount:g} {self.unit}: a budget must be more than zero")

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
class MeshShape:
    """Devices along each mesh axis: rows are split over data and fsdp, parameters over fsdp and tensor."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(f"{field.name} is {getattr(self, field.name)}: it must be 1 or more")

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    budget: Budget
    optimizer: AdamW = AdamW()
    schedule: Schedule
    accumulation: int = 1
    """Micro-batches a step; the gradient is that of the whole batch, weighed by loss weights."""
    seed: int = 0
    """Of initialisation and dropout; the data has its own."""
    validate_every: int
    """Steps between validation losses; one is always taken at the end."""
    checkpoint_every: int
    keep_last: int = 2
    """Checkpoints kept beside the best one."""
    mesh: MeshShape = MeshShape()
    execution: Execution = Execution()

    def __post_init__(self) -> None:
        for name in ("accumulation", "validate_every", "checkpoint_every", "keep_last"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be 1 or more")
