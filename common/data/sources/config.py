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
    """Text around a record's fields: `{field}` is replaced by a field's text, `{{` by a brace.

    >>> Template(inputs="{premise} Hence: {hypothesis}?", targets="{label}", words={"0": "yes"}).fields()
    ['hypothesis', 'label', 'premise']

    Raises UserError for anything else in braces.
    """

    inputs: str
    targets: str
    words: dict[str, str] = dataclasses.field(default_factory=dict)
    """Value of a field in `targets` -> the word to write for it; empty: values are written as they are."""

    def __post_init__(self) -> None:
        self.fields()

    def fields(self) -> list[str]:
        """Returns the names of all fields that the template uses, sorted."""
        return sorted(_placeholders(self.inputs) | _placeholders(self.targets))

    def input_fields(self) -> set[str]:
        """Returns the names of the fields in `inputs`, or those in `targets` if `inputs` uses none."""
        return _placeholders(self.inputs) or _placeholders(self.targets)


def _placeholders(template: str) -> set[str]:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}") from None
    for _, name, form, conversion in pieces:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise UserError(f"template {template!r}: {name!r} must be a field's name alone; write {{{{ for a brace")
    return {name for _, name, _, _ in pieces if name is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A data set, and which fields of its records to read.

    Raises UserError for an unknown scheme, and unless exactly one is set of: `inputs` and `targets`, `text`,
    `templates`.
    """

    kind: Literal["single"] = "single"
    name: str
    """`tfds:NAME` (`tfds:cldr_translate/en_de`, or with a version `tfds:c4/en:3.1.0`), `corpus:NAME`, or files:
    `jsonl:PATH`, `tsv:PATH`, `text:PATH`, `lines:PATH` (parallel texts; PATH contains `{field}`), `parquet:PATH`,
    `tfrecord:PATH` or `arrayrecord:PATH`. PATH may contain `{split}`, be a glob or a url (`gs://...`), and for the last
    three a folder; text may be compressed."""
    inputs: FieldName | None
    """Field of the inputs; None if records are plain text. A field is a name or a path ("answers.0.text"). For a `tsv:`
    file without a header it is the number of a column, from 1."""
    targets: FieldName | None
    text: FieldName | None = None
    """Field of plain text, instead of `inputs` and `targets`."""
    templates: tuple[Template, ...] = ()
    """Make inputs and targets from a record's fields; with several, one is drawn for each record."""
    group: FieldName | None = None
    """Field to group scores by (kind of phrase, task); models do not read it."""
    train_split: str = "train"
    validation_split: str = "validation"
    held_out: Annotated[float, Range(1e-6, 0.49)] | None = None
    """For files without `{split}` in their path: the share of records in the split `validation`, and as many in `test`,
    chosen by a hash of their inputs or text. None: all records are `train`."""
    strict: bool = False
    """Whether to stop at a record that cannot be used; otherwise such records are skipped, counted and reported."""

    def __post_init__(self) -> None:
        check_ranges(self)
        scheme, _, rest = self.name.partition(":")
        if scheme not in SOURCE_SCHEMES:
            raise UserError(
                f"name {self.name!r} must be SCHEME:NAME; scheme {scheme!r} is unknown: "
                + nearest(scheme, SOURCE_SCHEMES)
            )
        if not rest:
            raise UserError(f"name {self.name!r} must be SCHEME:NAME; there is nothing after the colon")
        data_set, _, split = rest.partition(":")
        if scheme == "tfds" and split and not re.fullmatch(TFDS_VERSION, split):
            raise UserError(
                f"name {self.name!r} contains a split, which belongs in train_split; nearest: name=tfds:{data_set} "
                f"train_split={split}"
            )
        pair = self.inputs is not None and self.targets is not None
        ways = pair + (self.text is not None) + bool(self.templates)
        if (self.inputs is None) != (self.targets is None) or ways != 1:
            raise UserError("name either both inputs and targets, or text alone, or templates alone")
        if not self.header and (scheme != "tsv" or any(isinstance(name, str) for name in self._field_names().values())):
            raise UserError("column numbers are for tsv files without a header, and then all fields must be numbers")
        if self.held_out is not None and (scheme in ("tfds", "corpus") or "{split}" in rest):
            raise UserError(f"held_out divides files without {{split}} in their path, but {self.name!r} has splits")

    def hashed_fields(self) -> tuple[str, ...]:
        """Returns our names of the fields whose hash decides a record's split; records equal in them share one."""
        if self.templates:
            return tuple(sorted({name for template in self.templates for name in template.input_fields()}))
        return ("inputs",) if self.text is None else ("text",)

    def fields(self) -> dict[str, str]:
        """Returns the fields to read: our name -> the source's."""
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
    """Draws each part in proportion to its rate."""

    kind: Literal["rate"] = "rate"
    rates: tuple[NotNegative, ...]

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BySize:
    """Rates in proportion to `min(examples, cap)` to the power 1 / temperature (arXiv 1910.10683, section 3.5.2)."""

    kind: Literal["size"] = "size"
    temperature: Annotated[float, Range(0.01, 1e6)] = 1.0
    """1 draws in proportion to size; higher values are closer to equal rates."""
    cap: Annotated[int, Range(1, 10**15, unit="examples")] | None = None
    """T5's artificial limit on a data set's size, in examples."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of a curriculum: its rates apply from a step on, until the next stage."""

    from_step: Steps
    rates: tuple[NotNegative, ...]

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceMixture:
    """Several sources, mixed by rate, by size or by a curriculum; each has its own epochs.

    Raises UserError unless there is one rate for each part and they have a positive sum, and for steps that do not
    ascend.
    """

    kind: Literal["mixture"] = "mixture"
    parts: tuple[SourceConfig, ...]
    by: ByRate | BySize = BySize()
    curriculum: tuple[Stage, ...] = ()
    """`by` applies before the first stage, and always to the validation split."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("parts are (): a mixture needs at least one part")
        fixed = [self.by.rates] if isinstance(self.by, ByRate) else []
        for rates in [*fixed, *(stage.rates for stage in self.curriculum)]:
            if len(rates) != len(self.parts):
                raise UserError(f"there are {len(rates)} rates {list(rates)}, but {len(self.parts)} parts")
            Mixing(rates=rates)
        steps = [0, *(stage.from_step for stage in self.curriculum)]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise UserError(f"curriculum steps {steps[1:]} must ascend from 1 on")

    def rates(self, sizes: list[int]) -> tuple[float, ...]:
        """Returns the initial rate of each part; `sizes` are the parts' numbers of examples."""
        match self.by:
            case ByRate(rates=rates):
                return rates
            case BySize(temperature=temperature, cap=cap):
                return rates_by_size(sizes, temperature=temperature, cap=cap)


Sources = SourceConfig | SourceMixture


def parts_of(source: Sources) -> tuple[SourceConfig, ...]:
    """Returns the parts of a mixture, or a single source alone."""
    return source.parts if isinstance(source, SourceMixture) else (source,)


def other_records(one: Sources, other: Sources, *, same_text: bool) -> str:
    """Returns why two configs do not read the same records in the same order; "" if they do, by whatever fields.

    >>> text = SourceConfig(name="tsv:a.tsv", inputs=None, targets=None, text="q")
    >>> pairs = {"inputs": "q", "targets": "a"}
    >>> other_records(text, SourceConfig(name="tsv:a.tsv", **pairs), same_text=False)
    ''
    >>> other_records(text, SourceConfig(name="tsv:b.tsv", **pairs), same_text=False)
    "name is 'tsv:b.tsv', not 'tsv:a.tsv'"

    Args:
      same_text: whether the field `text` must be the same too.
    """
    if isinstance(one, SourceMixture) and isinstance(other, SourceMixture) and len(one.parts) == len(other.parts):
        if (one.by, one.curriculum) != (other.by, other.curriculum):
            return "its parts have other rates"
        reasons = (other_records(*pair, same_text=same_text) for pair in zip(one.parts, other.parts, strict=True))
        return next((f"parts[{i}]: {reason}" for i, reason in enumerate(reasons) if reason), "")
    if isinstance(one, SourceMixture) or isinstance(other, SourceMixture):
        return "it has other parts"
    names = ("name", "train_split", "validation_split", "held_out", "strict", "header") + ("text",) * same_text
    if one.held_out is not None and one.hashed_fields() != other.hashed_fields():
        return f"held_out divides by {'+'.join(other.hashed_fields())}, not by {'+'.join(one.hashed_fields())}"
    values = ((name, getattr(other, name), getattr(one, name)) for name in names)
    return next((f"{name} is {b!r}, not {a!r}" for name, b, a in values if a != b), "")
