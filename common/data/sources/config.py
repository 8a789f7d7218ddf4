"""Where a run's records come from: one source, or a mixture of several."""

import dataclasses
import itertools
import re
import string
from typing import Annotated, Literal

from common.data.mixing import Mixing, rates_by_size
from common.errors import UserError, nearest
from common.ranges import NotNegative, Range, Steps, check_ranges

SOURCE_SCHEMES = ("tfds", "jsonl", "tsv", "text", "lines", "parquet", "arrayrecord", "tfrecord", "corpus")
FieldName = str | Annotated[int, Range(1, 10**6, unit="columns")]
TFDS_VERSION = r"\d+\.(\d+|\*)\.(\d+|\*)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """How a record is put to a model, in words: `{field}` stands for a field's text, `{{` for a brace.

    >>> Template(inputs="{premise} Hence: {hypothesis}?", targets="{label}", words={"0": "yes"}).fields()
    ['hypothesis', 'label', 'premise']

    Raises UserError for anything else in braces.
    """

    inputs: str
    targets: str
    words: dict[str, str] = dataclasses.field(default_factory=dict)
    """What stands for each value of the fields of `targets`; no words: the values themselves."""

    def __post_init__(self) -> None:
        self.fields()

    def fields(self) -> list[str]:
        """The names that both sides use, sorted."""
        return sorted(_placeholders(self.inputs) | _placeholders(self.targets))

    def input_fields(self) -> set[str]:
        """The names that the inputs use; where they use none, those of the targets."""
        return _placeholders(self.inputs) or _placeholders(self.targets)


def _placeholders(template: str) -> set[str]:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}") from None
    for _, name, form, conversion in pieces:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise UserError(f"template {template!r}: {name!r} must be the plain name of a field; a brace is {{{{")
    return {name for _, name, _, _ in pieces if name is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where text comes from, and which fields of a record are read.

    Raises UserError for an unknown scheme, or unless it names `inputs` and `targets`, or `text`, or `templates`.
    """

    kind: Literal["single"] = "single"
    name: str
    """`tfds:NAME` (`tfds:cldr_translate/en_de`, or with a version `tfds:c4/en:3.1.0`), `corpus:NAME`, or files:
    `jsonl:PATH`, `tsv:PATH`, `text:PATH`, `lines:PATH` (parallel texts; PATH holds `{field}`), `parquet:PATH`,
    `tfrecord:PATH` or `arrayrecord:PATH`. PATH may hold `{split}`, be a glob, an url (`gs://...`), and for the last
    three a folder; text may be compressed."""
    inputs: FieldName | None
    """Field that holds the inputs; None where records are plain text. A field is a name or a path of names, or of a
    `tsv:` file without a header the number of a column, from 1: then the first line is a record too."""
    targets: FieldName | None
    text: FieldName | None = None
    """Field that holds plain text, in place of `inputs` and `targets`."""
    templates: tuple[Template, ...] = ()
    """Make inputs and targets of a record's fields; of several, one is drawn for each record."""
    group: FieldName | None = None
    """Field by which scores are grouped (kind of phrase, task); not read by models."""
    train_split: str = "train"
    validation_split: str = "validation"
    held_out: Annotated[float, Range(1e-6, 0.49)] | None = None
    """The share of records that become the split `validation`, and again the split `test`, by a hash of their inputs or
    text; for files without `{split}` in their path. None: all records are `train`."""
    strict: bool = False
    """Stop at a record that cannot be used; otherwise such records are skipped, counted and named."""

    def __post_init__(self) -> None:
        check_ranges(self)
        scheme, _, rest = self.name.partition(":")
        if scheme not in SOURCE_SCHEMES or not rest:
            raise UserError(
                f"name {self.name!r} must be SCHEME:NAME; scheme {scheme!r} is unknown or nothing follows it, "
                + nearest(scheme, SOURCE_SCHEMES)
            )
        data_set, _, split = rest.partition(":")
        if scheme == "tfds" and split and not re.fullmatch(TFDS_VERSION, split):
            raise UserError(
                f"name {self.name!r} holds a split, which has fields of its own; nearest: name=tfds:{data_set} "
                f"train_split={split}"
            )
        pair = self.inputs is not None and self.targets is not None
        ways = pair + (self.text is not None) + bool(self.templates)
        if (self.inputs is None) != (self.targets is None) or ways != 1:
            raise UserError("name either both inputs and targets, or text alone, or templates alone")
        if not self.header and (scheme != "tsv" or any(isinstance(name, str) for name in self._field_names().values())):
            raise UserError("fields by number are for tsv files without a header, and then all must be numbers")
        if self.held_out is not None and (scheme in ("tfds", "corpus") or "{split}" in rest):
            raise UserError(f"held_out divides files whose path holds no {{split}}, but {self.name!r} has splits")

    def hashed_fields(self) -> tuple[str, ...]:
        """Our names of the fields whose hash decides on a record's split: records that share them stay together."""
        if self.templates:
            return tuple(sorted({name for template in self.templates for name in template.input_fields()}))
        return ("inputs",) if self.text is None else ("text",)

    def fields(self) -> dict[str, str]:
        """What is read of a record: our name of a field -> the source's."""
        return {ours: str(theirs) for ours, theirs in self._field_names().items()}

    @property
    def header(self) -> bool:
        """Whether the first line of a TSV file names its columns."""
        return not any(isinstance(theirs, int) for theirs in self._field_names().values())

    def _field_names(self) -> dict[str, str | int]:
        named = {name: getattr(self, name) for name in ("inputs", "targets", "text", "group")}
        used = {name: name for template in self.templates for name in template.fields()}
        return {ours: theirs for ours, theirs in named.items() if theirs is not None} | used


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByRate:
    """Each part as often as its rate says, beside the others'."""

    kind: Literal["rate"] = "rate"
    rates: tuple[NotNegative, ...]

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BySize:
    """Rates in proportion to `min(examples, cap)` to the power 1 / temperature (arXiv 1910.10683, section 3.5.2)."""

    kind: Literal["size"] = "size"
    temperature: Annotated[float, Range(0.01, 1e6)] = 1.0
    """1: proportional to size; the higher, the more equal."""
    cap: Annotated[int, Range(1, 10**15, unit="examples")] | None = None
    """T5's artificial limit on a data set's size, in examples."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """From one step of a curriculum on, other rates hold."""

    from_step: Steps
    rates: tuple[NotNegative, ...]

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceMixture:
    """Several sources, mixed by rate, by size or by a curriculum; each goes on through its own epochs.

    Raises UserError for rates that are too few or too many or sum to nothing, and for steps that do not ascend.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[SourceConfig, ...]
    by: ByRate | BySize = BySize()
    curriculum: tuple[Stage, ...] = ()
    """Before its first step, and on the validation split, what `by` says holds."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("parts are (): a mixture of nothing")
        fixed = [self.by.rates] if isinstance(self.by, ByRate) else []
        for rates in [*fixed, *(stage.rates for stage in self.curriculum)]:
            if len(rates) != len(self.parts):
                raise UserError(f"rates {list(rates)} are {len(rates)}, but there are {len(self.parts)} parts")
            Mixing(rates=rates)
        steps = [0, *(stage.from_step for stage in self.curriculum)]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise UserError(f"curriculum steps {steps[1:]} must ascend from 1 on")

    def rates(self, sizes: list[int]) -> tuple[float, ...]:
        """Of the parts, of so many examples each, at the beginning."""
        match self.by:
            case ByRate(rates=rates):
                return rates
            case BySize(temperature=temperature, cap=cap):
                return rates_by_size(sizes, temperature=temperature, cap=cap)


Sources = SourceConfig | SourceMixture


def parts_of(source: Sources) -> tuple[SourceConfig, ...]:
    return source.parts if isinstance(source, SourceMixture) else (source,)
