"""How to decode: the method, and where a text ends."""

import dataclasses
import math
from typing import Literal

from common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """The likeliest token at every step."""

    kind: Literal["greedy"] = "greedy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Draws from the model's distribution: temperature first, then top-k, then top-p."""

    kind: Literal["sample"] = "sample"
    temperature: float = 1.0
    """Logits are divided by it; greedy decoding is its limit at 0."""
    top_k: int | None = None
    """Keep the k likeliest tokens (Fan et al. 2018, arXiv 1805.04833)."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens with this mass (Holtzman et al. 2019, arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: it must be more than 0 (greedy decoding is its limit)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it must be 1 or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p is {self.top_p}: it must be more than 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beam:
    """Beam search; a text's score is its log-probability over ((5 + length) / 6)^length_penalty.

    The length counts the end token (Wu et al. 2016, arXiv 1609.08144, eq. 14; T5 uses 0.6).
    """

    kind: Literal["beam"] = "beam"
    size: int = 4
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"beam size is {self.size}: it must be 1 or more")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty is {self.length_penalty}: it must be a finite number")


Method = Greedy | Sample | Beam


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Where a text ends besides its end token."""

    max_new_tokens: int = 128
    """The end token counts."""
    min_new_tokens: int = 0
    """As many tokens come before an end token may."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these strings."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be 1 or more")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"min_new_tokens is {self.min_new_tokens}: it must be between 0 and max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if "" in self.stop:
            raise UserError("a stop string is empty: every text begins with it")
