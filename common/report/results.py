"""The result of a finished arm, for tables and reports (`result.json` in its run directory)."""

import dataclasses

from common.evals.measure import TextScore, TurnCost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Training FLOPs of the whole run, by named conventions."""

    full_attention: float
    """Counts every key for every query, as XLA does, and padded slots: what the hardware computed."""
    causal_half: float
    """Counts causal attention at half, and padded slots."""
    six_nd: float
    """6 x (parameters that a token passes through) x tokens; with padded slots, without attention scores."""
    useful_full_attention: float
    """As `full_attention`, but for real tokens only, each example alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmResult:
    """The measured result of one trained arm."""

    arm: str
    parameters: int
    steps: int
    flops: Flops
    examples: int
    tokens: int
    """Real (unpadded) input and target tokens seen."""
    loss_tokens: int
    """Target tokens with non-zero loss weight."""
    slots: int
    """Token slots computed, with padding."""
    input_fill: float | None
    target_fill: float
    """Share of the input and target slots that hold real tokens; None where rows have no input slots."""
    train_loss: float
    """Mean over the last tenth of the steps, nats per weighted token."""
    validation_loss: float
    """Nats per weighted token."""
    train_seconds: float
    """Wall time of the steps, without compilation and evaluation."""
    tokens_per_second: float
    """Real tokens over `train_seconds`."""
    data_wait_share: float
    """Share of step time spent waiting for data, 0..1."""
    fingerprint: str
    """Chained over all applied batches; hexadecimal."""
    xla_flops_per_step: float | None
    """FLOPs of the matrix products in the training step's program, as XLA gets it; None if not counted."""
    why_not_counted: str = ""
    ledger_flops_per_step: float
    """The ledger's count of the same products (full attention)."""
    scores: tuple[TextScore, ...]
    made_from: str = ""
    """Hash of everything that determines the result: config, data and what is scored."""
    multi_turn: tuple[TurnCost, ...] = ()
