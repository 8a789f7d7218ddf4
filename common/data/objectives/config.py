"""Which pretraining objective a run has, and what it asks of rows and tokenizer.

Everything is checked when it is made; what the objectives do is in `common.data.objectives.apply`.
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
    """Inputs and targets as the source gives them, loss on all target tokens.

    T5's convention (seqio's `append_eos`) ends both sides with eos.
    """

    kind: Literal["supervised"] = "supervised"
    eos_after_inputs: bool = True
    eos_after_targets: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Each text on its own as targets behind empty inputs, loss on every token; a text must fit a row."""

    kind: Literal["causal_lm"] = "causal_lm"
    eos: bool = True
    """End each text with eos."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullLM:
    """A plain language model over text of any length: eos behind each text, all joined, cut into rows of targets.

    T5's language modelling objective for a decoder (section 3.2.3), and how decoder-only models are pretrained.
    """

    kind: Literal["full_lm"] = "full_lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption:
    """Spans cut out of a text are its targets: T5's objective (arXiv 1910.10683, section 3.1.4).

    All texts are joined end to end, as T5 joins them, and cut into the longest pieces whose inputs fit a row.
    """

    kind: Literal["span_corruption"] = "span_corruption"
    density: Density = 0.15
    """Share of tokens that are noise."""
    mean_span: Annotated[float, Range(1, 2**20, unit="tokens")] = 3.0
    """Tokens a span, on average."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IidDenoising:
    """As span corruption, with every token noise or not by its own draw (section 3.3.2); pieces as long as inputs."""

    kind: Literal["iid_denoising"] = "iid_denoising"
    density: Density = 0.15

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertStyle:
    """A text with masked tokens, to the whole text (section 3.3.1); without random tokens, its MASS style."""

    kind: Literal["bert_style"] = "bert_style"
    density: Density = 0.15
    random_share: Share = 0.1
    """Share of the masked tokens that become random ones; the rest become sentinel 0."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deshuffling:
    """A text's tokens in any order, to the text (section 3.3.1)."""

    kind: Literal["deshuffling"] = "deshuffling"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM:
    """A piece of text cut at a random place: what stands before it are inputs, what follows targets (section 3.3.1)."""

    kind: Literal["prefix_lm"] = "prefix_lm"
    complementary: bool = False
    """Cut pieces in pairs, the one behind s tokens and the other behind L - s: each pair fills a row of L + L slots,
    and no family has padding (Wang et al. 2022, arXiv 2204.05832). No eos is added."""


RawText = FullLM | SpanCorruption | IidDenoising | BertStyle | Deshuffling | PrefixLM
"""Objectives that read one long text in pieces."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixturePart:
    """One objective of a mixture."""

    objective: RawText
    rate: NotNegative = 1.0
    """How often, beside the other parts' rates."""
    mode: str = ""
    """Text in front of the inputs that says which objective this is. Capital letters in square brackets, as UL2's
    `[S2S]`, are one token of a tokenizer that is trained for the run; everything else is spelled as any text is."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several objectives over the same text, each over pieces of its own length: UL2 (arXiv 2205.05131) is one.

    Raises UserError for rates that sum to nothing.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[MixturePart, ...]

    def __post_init__(self) -> None:
        Mixing(rates=tuple(part.rate for part in self.parts))
        for number, part in enumerate(self.parts):
            if isinstance(part.objective, PrefixLM) and part.objective.complementary:
                raise UserError(f"parts[{number}]: complementary pairs fill rows by themselves and cannot be mixed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2:
    """UL2's seven denoisers with their mode tokens (arXiv 2205.05131, section 3.1 and table 1).

    Two public implementations give the fourth X-denoiser density 0.15; only 0.5 fits the paper's own definition of one.
    """

    kind: Literal["ul2"] = "ul2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2R:
    """The smaller mixture with which a trained language model goes on (arXiv 2210.11399).

    Denoisers as in Levanter's implementation, half of the examples prefix language modelling; these rates were not
    checked against the paper. Its S-denoiser cuts at a place drawn evenly, without sentinels.
    """

    kind: Literal["ul2r"] = "ul2r"


Single = Supervised | CausalLM | RawText
Objective = Single | Mixture | UL2 | UL2R


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What an objective over pieces of text asks of rows and tokenizer."""

    piece: int
    """Tokens of text an example is made of."""
    targets: int
    """Target slots without which no whole piece fits."""
    sentinels: int


def needs_of(objective: RawText, input_length: int, target_length: int) -> Needs:
    """Of rows of so many slots.

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
            # As many spans as there are on average, what more there may be is left as it is; and targets so long that
            # four standard deviations (of noise and spans as if they went together) are none too many.
            targets = noise + spans + 1 + 4 * (math.sqrt(noise * (1 - density)) + math.sqrt(spans) / 2)
            return Needs(piece=piece, targets=math.ceil(targets), sentinels=math.ceil(spans) + 1)
        case BertStyle():
            return Needs(piece=shorter - 1, targets=shorter, sentinels=1)
        case Deshuffling():
            return Needs(piece=shorter - 1, targets=shorter, sentinels=0)
        case PrefixLM():
            return Needs(piece=shorter, targets=shorter, sentinels=0)


def raw_parts(objective: Objective) -> tuple[MixturePart, ...]:
    """What an objective over pieces of text consists of; nothing where it reads whole records."""
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
    """Whether examples have inputs; a language model's are targets alone.

    >>> has_inputs(Supervised()), has_inputs(CausalLM()), has_inputs(FullLM()), has_inputs(UL2())
    (True, False, False, True)
    """
    parts = raw_parts(objective)
    return any(not isinstance(part.objective, FullLM) for part in parts) if parts else isinstance(objective, Supervised)


def mode_names(objective: Objective) -> tuple[str, ...]:
    """The modes that a tokenizer trained for the objective has a token for.

    >>> mode_names(UL2()), mode_names(SpanCorruption())
    (('[NLU]', '[S2S]', '[NLG]'), ())
    """
    modes = (part.mode for part in raw_parts(objective) if MODE.fullmatch(part.mode))
    return tuple(dict.fromkeys(modes))


def _denoisers(mode: str, rate: float, *shapes: tuple[float, float]) -> tuple[MixturePart, ...]:
    """A part for each (density, mean span), of equal rates that sum to `rate`."""
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
