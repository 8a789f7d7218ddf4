"""Configs of decoding: the method, where a text ends, and how many texts to generate at a time."""

import dataclasses
from typing import Annotated, Literal

from common.errors import UserError
from common.ranges import Range, Rows, Seed, Width, check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """Chooses the most probable token at every step."""

    kind: Literal["greedy"] = "greedy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Draws from the model's distribution; the temperature applies first, then top-k, then top-p."""

    kind: Literal["sample"] = "sample"
    temperature: Annotated[float, Range(1e-30, 1e6)] = 1.0
    """Divides the logits; as it goes to 0, sampling becomes greedy decoding."""
    top_k: Width | None = None
    """Keep the k most probable tokens (Fan et al. 2018, arXiv 1805.04833)."""
    top_p: Annotated[float, Range(0, 1, "(]")] = 1.0
    """Keep the fewest most probable tokens whose probabilities sum to this (Holtzman et al. 2019, arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam:
    """Beam search. A text's score is its log-probability divided by ((5 + length) / 6)^length_penalty.

    The length includes the end token (Wu et al. 2016, arXiv 1609.08144, eq. 14; T5 uses 0.6).
    """

    kind: Literal["beam"] = "beam"
    size: Annotated[int, Range(1, 1024, unit="beams")] = 4
    length_penalty: Annotated[float, Range(-100, 100)] = 0.6

    def __post_init__(self) -> None:
        check_ranges(self)


Method = Greedy | Sample | Beam
GREEDY = Greedy()

NewTokens = Annotated[int, Range(1, 2**20, unit="tokens")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Where a text ends, apart from its end token."""

    max_new_tokens: NewTokens = 128
    """Includes the end token."""
    min_new_tokens: Annotated[int, Range(0, 2**20, unit="tokens")] = 0
    """No end token is generated before this many tokens."""
    stop: tuple[str, ...] = ()
    """A text is cut before the first of these strings."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens is {self.min_new_tokens}: it must be at most max_new_tokens ({self.max_new_tokens})"
            )
        if "" in self.stop:
            raise UserError("a stop string is empty: every text begins with it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What to generate for each prompt, and how many prompts at a time."""

    method: Method = GREEDY
    limits: Limits = Limits()
    seed: Seed = 0
    samples: Annotated[int, Range(1, 10**6, unit="texts")] = 1
    """Texts per prompt."""
    rows: Rows = 8
    """Prompts per device and batch."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.samples > 1 and not isinstance(self.method, Sample | Beam):
            raise UserError(f"samples is {self.samples}, but greedy decoding generates one text: give a temperature")
        if isinstance(self.method, Beam) and self.samples > self.method.size:
            raise UserError(f"samples is {self.samples}, but there are {self.method.size} beams; nearest: that many")

    @property
    def decodings(self) -> int:
        """How often a prompt is decoded: once for every sample; beam search finds all texts of a prompt at once."""
        return self.samples if isinstance(self.method, Sample) else 1
