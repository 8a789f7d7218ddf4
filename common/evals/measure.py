"""Results of evaluators: scores of decoded text, overlap with the training data, costs of conversation turns."""

import dataclasses

from common.analysis.interval import Interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class InTraining:
    """How many examples of a test set also occur in the training data."""

    examples: int
    """The number of examples searched for."""
    inputs: int
    targets: int
    both: int
    """The number of examples whose inputs and targets occur together in one record."""
    complete: bool
    """False if only the first part of very large training data was searched."""

    def sentence(self, split: str) -> str:
        """Returns the counts as a sentence.

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
    """Scores of decoded text against its references, for one group of examples."""

    split: str
    group: str
    """The kind of example; "all" is the whole split."""
    examples: int
    exact_match: Interval
    """A share, 0..1."""
    bleu: Interval | None
    """0..100, as sacrebleu computes it; None if the group has no BLEU."""
    bleu_signature: str | None = None
    """sacrebleu's description of how BLEU was computed."""
    in_training: InTraining | None = None
    """None if it was not counted, and for groups of a split."""
    copied_bleu: float | None = None
    """BLEU of the inputs against the same references, which a translation must beat."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnCost:
    """Time of one conversation turn, from a user's message to the state that gives the answer's first token."""

    turn: int
    history_tokens: int
    """Tokens of earlier turns, read or generated."""
    read_again_seconds: float
    """Median; reads the whole conversation again."""
    read_new_seconds: float | None
    """Median; keeps the cache of earlier turns and reads only the message. None if the family's attention does not
    allow it."""
