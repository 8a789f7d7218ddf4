"""What a finished arm leaves behind for tables and reports (`result.json` in its run directory)."""

import dataclasses

from common.evals.measure import TextScore, TurnCost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Training FLOPs of the whole run, by named convention."""

    full_attention: float
    """Every key counted for every query, as XLA does; padded slots included: what the hardware did."""
    causal_half: float
    """Causal attention counted at half; padded slots included."""
    six_nd: float
    """6 x (parameters that a token passes through) x tokens; padded slots included, attention scores left out."""
    useful_full_attention: float
    """As `full_attention`, over real tokens only, each example by itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One trained arm."""

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
    """Token slots computed on, padding included."""
    input_fill: float | None
    target_fill: float
    """Share of the input and target slots that hold real tokens; None where rows have no input slots."""
    train_loss: float
    """Mean over the last tenth of the steps, nats per weighted token."""
    validation_loss: float
    """Nats per weighted token."""
    train_seconds: float
    """Wall time of the steps, compilation and evaluation left out."""
    tokens_per_second: float
    """Real tokens over `train_seconds`."""
    data_wait_share: float
    """Share of step time spent waiting for data, 0..1."""
    fingerprint: str
    """Chained over all applied batches, hexadecimal."""
    xla_flops_per_step: float | None
    """Matrix products of the training step, counted in the program that XLA is given; None: not counted."""
    why_not_counted: str = ""
    ledger_flops_per_step: float
    """The ledger's count of the same (full attention)."""
    scores: tuple[TextScore, ...]
    made_from: str = ""
    """Hash of all that decides it: config, data and what is scored."""
    multi_turn: tuple[TurnCost, ...] = ()
