"""Configs of pretraining objectives, and what each requires of rows and tokenizer.

Configs are checked when they are made. `common.data.objectives.apply` does what they describe.
"""

import dataclasses
import math
from typing import Annotated, Literal

from common.data.mixing import Mixing
from common.data.objectives.spans import fit_inputs
from common.data.tokenizers.vocabulary import MODE
from common.errors import UserError
from common.ranges import NotNegative, Range, Share, check_ranges

Density = Annotated[float, Range(0, 1, "()")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Supervised:
    """Inputs and targets as they are in the source, loss on all target tokens.

    By default eos ends both, which is T5's convention (seqio's `append_eos`).
    """

    kind: Literal["supervised"] = "supervised"
    eos_after_inputs: bool = True
    eos_after_targets: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM:
    """A language model over whole texts: each text is an example's targets, with empty inputs, and must fit a row."""

    kind: Literal["causal_lm"] = "causal_lm"
    eos: bool = True
    """Whether eos ends each text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullLM:
    """A language model over texts of any length, joined with an eos after each and cut into rows of targets.

    Decoder-only models are pretrained this way; in T5's paper it is language modelling (section 3.2.3).
    """

    kind: Literal["full_lm"] = "full_lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Cuts spans out of a text and makes them its targets: T5's objective (arXiv 1910.10683, section 3.1.4).

    All texts are joined end to end, as in T5, and cut into the longest pieces whose inputs fit a row.
    """

    kind: Literal["span_corruption"] = "span_corruption"
    density: Density = 0.15
    """Share of tokens that are noise."""
    mean_span: Annotated[float, Range(1, 2**20, unit="tokens")] = 3.0
    """Mean tokens in a span."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IidDenoising:
    """Span corruption that draws for each token whether it is noise (section 3.3.2); pieces fill the input slots."""

    kind: Literal["iid_denoising"] = "iid_denoising"
    density: Density = 0.15

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertStyle:
    """Restores a text some of whose tokens are masked (section 3.3.1); without random tokens, T5's MASS style."""

    kind: Literal["bert_style"] = "bert_style"
    density: Density = 0.15
    random_share: Share = 0.1
    """Share of the masked tokens that random ones replace; sentinel 0 replaces the others."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deshuffling:
    """Restores the order of a text's shuffled tokens (section 3.3.1)."""

    kind: Literal["deshuffling"] = "deshuffling"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """Continues a piece of text from a random cut: inputs are before it, targets after it (section 3.3.1)."""

    kind: Literal["prefix_lm"] = "prefix_lm"
    complementary: bool = False
    """Cut pieces in pairs, one after s tokens and the other after L - s: each pair fills a row of L + L slots, and no
    family has padding (Wang et al. 2022, arXiv 2204.05832). No eos is added."""


RawText = FullLM | SpanCorruption | IidDenoising | BertStyle | Deshuffling | PrefixLM
"""Objectives that read one long text in pieces."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One objective of a mixture."""

    objective: RawText
    rate: NotNegative = 1.0
    """How often it is used, relative to the other parts' rates."""
    mode: str = ""
    """Text that begins the inputs and names this objective to the model. Capital letters in square brackets, like UL2's
    `[S2S]`, are one token of a tokenizer trained for the run; any other mode is tokenised as ordinary text."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several objectives over the same text, each with its own length of piece; UL2 (arXiv 2205.05131) is one.

    Raises UserError for rates that sum to 0 and for complementary pairs.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...]

    def __post_init__(self) -> None:
        Mixing(rates=tuple(part.rate for part in self.parts))
        for i, part in enumerate(self.parts):
            if isinstance(part.objective, PrefixLM) and part.objective.complementary:
                raise UserError(f"parts[{i}]: complementary pairs fill rows by themselves and cannot be mixed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2:
    """UL2's seven denoisers with their mode tokens (arXiv 2205.05131, section 3.1 and table 1).

    Two public implementations use density 0.15 for the fourth X-denoiser; only 0.5 fits the paper's definition of one.
    """

    kind: Literal["ul2"] = "ul2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2R:
    """A smaller mixture for the continued training of a language model (arXiv 2210.11399).

    Denoisers and rates are those of Levanter's implementation, not checked against the paper; half of the examples are
    prefix language modelling, which cuts a text at a uniform random token and uses no sentinels.
    """

    kind: Literal["ul2r"] = "ul2r"


Single = Supervised | CausalLM | RawText
Objective = Single | Mixture | UL2 | UL2R


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective over pieces of text requires of rows and tokenizer."""

    piece: int
    """Tokens of text in an example."""
    targets: int
    """The fewest target slots of a row that can hold a whole piece."""
    sentinels: int
    """Sentinels that the tokenizer must have."""


def needs_of(objective: RawText, input_length: int, target_length: int) -> Needs:
    """Computes the needs of `objective` in rows of `input_length` + `target_length` slots.

    >>> needs_of(SpanCorruption(), 512, 114)
    Needs(piece=568, targets=114, sentinels=28)
    """
    shorter = min(input_length, target_length)
    match objective:
        case FullLM():
            return Needs(piece=target_length, targets=1, sentinels=0)
        case SpanCorruption():
            fitted = fit_inputs(input_length, objective.density, objective.mean_span)
            return Needs(piece=fitted.length, targets=fitted.targets, sentinels=fitted.spans)
        case IidDenoising():
            piece, density = input_length - 1, objective.density
            noise, spans = piece * density, piece * density * (1 - density)
            # Sentinels for the mean number of spans; noise in further spans stays in the inputs. Target slots for four
            # standard deviations above the mean, as if noise and spans were perfectly correlated.
            targets = noise + spans + 1 + 4 * (math.sqrt(noise * (1 - density)) + math.sqrt(spans) / 2)
            return Needs(piece=piece, targets=math.ceil(targets), sentinels=math.ceil(spans) + 1)
        case BertStyle():
            return Needs(piece=shorter - 1, targets=shorter, sentinels=1)
        case Deshuffling():
            return Needs(piece=shorter - 1, targets=shorter, sentinels=0)
        case PrefixLM():
            return Needs(piece=shorter, targets=shorter, sentinels=0)


def raw_parts(objective: Objective) -> tuple[MixturePart, ...]:
    """Returns the parts of an objective over pieces of text; none for an objective that reads whole records."""
    match objective:
        case Supervised() | CausalLM():
            return ()
        case Mixture():
            return objective.parts
        case UL2():
            return _UL2
        case UL2R():
            return _UL2R
        case _:
            return (MixturePart(objective=objective),)


def has_inputs(objective: Objective) -> bool:
    """Returns whether examples have inputs; those of a language model have targets only.

    >>> has_inputs(Supervised()), has_inputs(CausalLM()), has_inputs(FullLM()), has_inputs(UL2())
    (True, False, False, True)
    """
    parts = raw_parts(objective)
    return any(not isinstance(part.objective, FullLM) for part in parts) if parts else isinstance(objective, Supervised)


def mode_names(objective: Objective) -> tuple[str, ...]:
    """Returns the modes that are one token each of a tokenizer trained for the objective.

    >>> mode_names(UL2()), mode_names(SpanCorruption())
    (('[NLU]', '[S2S]', '[NLG]'), ())
    """
    modes = (part.mode for part in raw_parts(objective) if MODE.fullmatch(part.mode))
    return tuple(dict.fromkeys(modes))


def _denoisers(mode: str, rate: float, *shapes: tuple[float, float]) -> tuple[MixturePart, ...]:
    """Returns one part for each (density, mean span), with equal rates that sum to `rate`."""
    return tuple(
        MixturePart(objective=SpanCorruption(density=density, mean_span=span), rate=rate / len(shapes), mode=mode)
        for density, span in shapes
    )


_UL2 = (
    *_denoisers("[NLU]", 0.33, (0.15, 3.0), (0.15, 8.0)),
    MixturePart(objective=PrefixLM(), rate=0.34, mode="[S2S]"),
    *_denoisers("[NLG]", 0.33, (0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0)),
)
_UL2R = (
    *_denoisers("[NLU]", 0.25, (0.15, 3.0)),
    *_denoisers("[NLG]", 0.25, (0.15, 32.0), (0.5, 3.0)),
    MixturePart(objective=PrefixLM(), rate=0.5, mode="[S2S]"),
)
