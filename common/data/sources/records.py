"""The protocol of a source (records by number), and how the fields of a raw record become text."""

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.errors import UserError, nearest

Record = dict[str, str]
"""Our name of a field -> its text."""

TEXT_FIELDS = ("inputs", "targets", "text")
"""Our fields that must be text; all others may also be numbers, which `number_text` writes."""
RECORD_BYTES = 1 << 25
"""Longer records are not read: memory holds several copies of some records, as text and as tokens."""
BATCH_CHARACTERS = 1 << 22
"""A batch of records is full once it has this many characters."""
RECORDS_PER_READ = 64
NO_GROUP = "(none)"
INTEGERS_BELOW = 1e16
"""Larger floats are written with an exponent."""
NUMBER_TEXT_VERSION = 2
"""Part of content ids: raise it with any change of how `number_text` writes numbers."""


class Problem(NamedTuple):
    """Why a record cannot be used. The reader decides whether to stop, or to skip and report it."""

    where: str
    """Source and record, as a person would look them up."""
    what: str
    """What is wrong with the record."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Source(Protocol):
    """Records by number; each maps our field names to text.

    Sources can be sent to other processes, by pickling, and read from several threads.
    """

    @property
    def content_id(self) -> str:
        """Differs whenever the records may differ: it names the data set and its version, the split, the fields read,
        and the version of the code that made the records."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Returns one record. Raises UserError if it cannot be used."""
        ...

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        """Returns several records, much faster than one by one, and fastest for ascending indices."""
        ...


class FeatureValues(list[Any]):
    """The values of one tf.Example feature, which stores one value and a list of one value alike."""


class UnusableRecord(ValueError):
    """Raised inside a source for a record that cannot be used; readers get a Problem instead."""


class SourceBase(abc.ABC):
    """Implements `source[i]` with `read`."""

    @abc.abstractmethod
    def read(self, indices: Sequence[int]) -> list[Record | Problem]: ...

    def __getitem__(self, index: int) -> Record:
        record = self.read([index])[0]
        if isinstance(record, Problem):
            raise UserError(str(record))
        return record


def too_long_reason(size: int) -> str:
    """Returns why a record of `size` bytes is not read; "" if it is not too long."""
    if size <= RECORD_BYTES:
        return ""
    return f"it has {size:,} bytes, but the limit is {RECORD_BYTES >> 20} MiB; divide it into several"


def in_batches(source: Source, indices: Sequence[int], most: int) -> Iterator[list[Record | Problem]]:
    """Yields the records in batches of at most `most`; batches of long records are smaller, which bounds memory."""
    batch: list[Record | Problem] = []
    characters, start, step = 0, 0, RECORDS_PER_READ
    while start < len(indices):
        found = source.read(indices[start : start + step])
        start += len(found)
        batch += found
        lengths = [sum(map(len, record.values())) if isinstance(record, dict) else 0 for record in found]
        characters += sum(lengths)
        step = max(1, min(RECORDS_PER_READ, BATCH_CHARACTERS // max(*lengths, 1)))
        if characters >= BATCH_CHARACTERS or len(batch) + step > most:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_range(indices: Sequence[int], count: int) -> None:
    """Raises IndexError unless all indices are in 0..count-1."""
    if len(indices) and not (min(indices) >= 0 and max(indices) < count):
        outside = next(index for index in indices if not 0 <= index < count)
        raise IndexError(f"record {outside} of {count}")


def pick_fields(raw: Mapping[str, Any], fields: Mapping[str, str]) -> Record:
    """Returns the requested fields as text.

    >>> raw = {"en": "a", "n": 3, "answers": [{"text": b"b"}]}
    >>> pick_fields(raw, {"inputs": "en", "targets": "answers.0.text", "id": "n"})
    {'inputs': 'a', 'targets': 'b', 'id': '3'}

    Args:
      raw: the stored record: names -> text, bytes, numbers, and dicts and lists of these.
      fields: our name of a field -> its name in `raw`, or a path into dicts and lists ("answers.0.text").

    Raises UnusableRecord for a field that is missing or not text.
    """
    return {ours: _field_or_group(raw, ours, theirs) for ours, theirs in fields.items()}


def _field_or_group(raw: Mapping[str, Any], ours: str, theirs: str) -> str:
    try:
        return _field_text(look_up_field(raw, ours, theirs), ours, theirs)
    except UnusableRecord:
        if ours == "group":  # models do not read it, so it must not decide which records are used
            return NO_GROUP
        raise


def look_up_field(raw: Mapping[str, Any], ours: str, theirs: str) -> Any:
    """Returns the value at a name or path. Raises UnusableRecord if there is none."""
    if theirs in raw:
        return raw[theirs]
    value: Any = raw
    for part in theirs.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif is_list(value) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise UnusableRecord(f"no field {theirs!r} (source.{ours}); {nearest(theirs, field_paths(raw))}")
    return value


def is_list(value: Any) -> bool:
    """Returns whether the next part of a path can be a number."""
    return isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim > 0)


def number_text(value: Any) -> str:
    """Returns a number as text: integers without a point, even from a float column; others in the fewest digits.

    >>> number_text(1.0), number_text(np.float32(0.1)), number_text(float(np.float32(0.1))), number_text(True)
    ('1', '0.1', '0.1', 'True')

    Raises UnusableRecord for NaN and infinity.
    """
    if not isinstance(value, float | np.floating):
        return str(value)
    number = float(value)
    if not math.isfinite(number):
        raise UnusableRecord(f"{value} is not a finite number")
    if number.is_integer() and abs(number) < INTEGERS_BELOW:
        return str(int(number))
    with np.errstate(over="ignore", under="ignore"):
        single = np.float32(number)  # many files store float32, which readers widen
    return str(single) if float(single) == number else str(number)


def field_paths(raw: Mapping[str, Any]) -> list[str]:
    """Returns the paths of all fields of a record; of a list, those of the first two items.

    >>> field_paths({"q": "x", "answers": [{"text": "a"}, {"text": "b"}]})
    ['q', 'answers.0.text', 'answers.1.text']
    """
    return [path.removeprefix(".") for path in _paths_below("", raw)]


def _paths_below(path: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [below for name, inner in value.items() for below in _paths_below(f"{path}.{name}", inner)]
    if isinstance(value, FeatureValues) and len(value) == 1:
        return [path]
    if is_list(value):
        return [below for number, inner in enumerate(value[:2]) for below in _paths_below(f"{path}.{number}", inner)]
    return [path]


def _field_text(value: Any, ours: str, theirs: str) -> str:
    """Returns a field's value as text. Raises UnusableRecord if it is not text, nor a number where ours may be one."""
    if isinstance(value, FeatureValues) and len(value) == 1:
        (value,) = value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UnusableRecord(f"field {theirs!r} (source.{ours}): byte {error.start + 1} is not UTF-8") from error
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                what = f"character {error.start + 1} is half of a surrogate pair"
                raise UnusableRecord(f"field {theirs!r} (source.{ours}): {what}, which is not text") from error
        return value
    if ours not in TEXT_FIELDS and (isinstance(value, int | float) or getattr(value, "shape", None) == ()):
        try:
            return number_text(value)
        except UnusableRecord as error:
            raise UnusableRecord(f"field {theirs!r} (source.{ours}): {error}") from None
    kind = "null" if value is None else "list" if is_list(value) else type(value).__name__
    raise UnusableRecord(f"field {theirs!r} (source.{ours}) must be text, not {kind}")
