"""What evaluators measure: scores of decoded text, texts shared with the training data, costs of turns."""

import dataclasses

from common.analysis.interval import Interval


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
