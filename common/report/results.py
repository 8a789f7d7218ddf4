"""What a finished arm leaves behind for tables and reports (`result.json` in its run directory)."""

import dataclasses

from common.analysis.interval import Interval


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
class InTraining:
    """Examples of a test set whose texts stand in the training data as well."""

    examples: int
    """The number of examples searched for."""
    inputs: int
    targets: int
    both: int
    """The number of examples whose inputs and targets occur together in one record."""
    complete: bool
    """Whether all of the training data were searched, and not the first part of very large ones."""

    def sentence(self, split: str) -> str:
        """
        >>> InTraining(examples=1000, inputs=328, targets=12, both=10, complete=True).sentence("test")
        'test: of 1,000 examples, the training data hold the inputs of 328, the targets of 12, and both together of 10'
        """
        where = "the training data hold" if self.complete else "the first part of the training data holds"
        if not self.inputs + self.targets:
            return f"{split}: of {self.examples:,} examples, {where} neither inputs nor targets"
        return (
            f"{split}: of {self.examples:,} examples, {where} the inputs of {self.inputs:,}, the targets of "
            f"{self.targets:,}, and both together of {self.both:,}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextScore:
    """Decoded text against its references, for one group of examples."""

    split: str
    group: str
    """Kind of phrase; "all" is the whole split."""
    examples: int
    exact_match: Interval
    """Share in 0..1."""
    bleu: Interval | None
    """0..100 (sacrebleu); None where the group is not scored with it."""
    bleu_signature: str | None = None
    """sacrebleu's description of how BLEU was computed."""
    in_training: InTraining | None = None
    """None where it was not counted, and for groups of a split."""
    copied_bleu: float | None = None
    """BLEU of the inputs themselves against the same references: what a model must beat that translates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnCost:
    """Of one turn of a conversation: from a message to the state that the answer's first token is drawn from."""

    turn: int
    history_tokens: int
    """Read or written in the turns before."""
    read_again_seconds: float
    """Median; the whole conversation is read."""
    read_new_seconds: float | None
    """Median; the cache of the turns before is kept and the message alone is read. None where the family's attention
    forbids it."""


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
