"""What a source is: records by number, some of which may turn out to be unusable."""

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from common.errors import UserError, nearest

Record = dict[str, str]
"""Our name of a field -> its text."""

TEXT_FIELDS = ("inputs", "targets", "text")
"""Our fields that must be text; all others may be numbers too, and are written by `number_text`."""
RECORD_BYTES = 1 << 25
"""The longest record of a file that is read: memory holds some of them several times over, as text and as tokens."""
BATCH_CHARACTERS = 1 << 22
"""Characters after which a batch of records is full."""
RECORDS_PER_READ = 64
NO_GROUP = "(none)"
INTEGERS_BELOW = 1e16
"""Larger floats are written as powers of ten."""
NUMBER_TEXT_VERSION = 2
"""Part of content ids: raise it with any change of how numbers are written."""


class Problem(NamedTuple):
    """Why a record cannot be used. Its reader decides whether to stop or to go on and say so."""

    where: str
    """Source and record, as a person would look for it."""
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class Source(Protocol):
    """Records by number; each has the fields that were asked for, as text.

    Objects can be copied to other processes, and read there and from several threads.
    """

    @property
    def content_id(self) -> str:
        """Differs whenever the records may: it holds name, version, split, the fields read, and the version of whatever
        made the records."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Raises UserError where the record cannot be used."""
        ...

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        """Several records at once, which is many times faster than one by one, and for indices in ascending order
        fastest."""
        ...


class FeatureValues(list[Any]):
    """The values of one tf.Example feature, where one value looks the same as a list of one."""


class UnusableRecord(ValueError):
    """Raised inside a source: what is wrong with one record. Readers see it as a Problem."""


class SourceBase(abc.ABC):
    """What all sources do alike, on top of their `read`."""

    @abc.abstractmethod
    def read(self, indices: Sequence[int]) -> list[Record | Problem]: ...

    def __getitem__(self, index: int) -> Record:
        record = self.read([index])[0]
        if isinstance(record, Problem):
            raise UserError(str(record))
        return record


def too_long_reason(size: int) -> str:
    """Why a record of so many bytes is not read; empty where it is."""
    if size <= RECORD_BYTES:
        return ""
    return f"it has {size:,} bytes, of which a record may have {RECORD_BYTES >> 20} MiB; divide it into several"


def in_batches(source: Source, indices: Sequence[int], most: int) -> Iterator[list[Record | Problem]]:
    """The records in order, at most `most` at once and fewer where they are long, so that memory stays flat."""
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
    """What a library has to say, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_range(indices: Sequence[int], count: int) -> None:
    """Raises IndexError unless all indices lie in 0..count-1."""
    if len(indices) and not (min(indices) >= 0 and max(indices) < count):
        outside = next(index for index in indices if not 0 <= index < count)
        raise IndexError(f"record {outside} of {count}")


def pick_fields(raw: Mapping[str, Any], fields: Mapping[str, str]) -> Record:
    """The fields that were asked for, as text.

    >>> raw = {"en": "a", "n": 3, "answers": [{"text": b"b"}]}
    >>> pick_fields(raw, {"inputs": "en", "targets": "answers.0.text", "id": "n"})
    {'inputs': 'a', 'targets': 'b', 'id': '3'}

    Args:
      raw: a record as it is stored: names -> text, bytes, numbers, and dicts and lists of them.
      fields: our name -> its name there, which may be a path into dicts and lists, split by dots.

    Raises UnusableRecord.
    """
    return {ours: _field_or_group(raw, ours, theirs) for ours, theirs in fields.items()}


def _field_or_group(raw: Mapping[str, Any], ours: str, theirs: str) -> str:
    try:
        return _field_text(look_up_field(raw, ours, theirs), ours, theirs)
    except UnusableRecord:
        if ours == "group":  # no part of what models read, so that which records there are must not hang on it
            return NO_GROUP
        raise


def look_up_field(raw: Mapping[str, Any], ours: str, theirs: str) -> Any:
    """What `raw` has under a name or a path. Raises UnusableRecord where there is nothing."""
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
    """Whether a path may go on with a number."""
    return isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim > 0)


def number_text(value: Any) -> str:
    """A number as text: a whole one without a point, whatever its column's type, any other in the fewest digits.

    >>> number_text(1.0), number_text(np.float32(0.1)), number_text(float(np.float32(0.1))), number_text(True)
    ('1', '0.1', '0.1', 'True')

    Raises UnusableRecord for NaN, which stands for no value, and for infinity.
    """
    if not isinstance(value, float | np.floating):
        return str(value)
    number = float(value)
    if not math.isfinite(number):
        raise UnusableRecord(f"{value} is no value")
    if number.is_integer() and abs(number) < INTEGERS_BELOW:
        return str(int(number))
    with np.errstate(over="ignore", under="ignore"):
        single = np.float32(number)  # many files hold such numbers, which readers widen
    return str(single) if float(single) == number else str(number)


def field_paths(raw: Mapping[str, Any]) -> list[str]:
    """All names in a record that can be asked for.

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
                raise UnusableRecord(f"field {theirs!r} (source.{ours}): {what}, which is no text") from error
        return value
    if ours not in TEXT_FIELDS and (isinstance(value, int | float) or getattr(value, "shape", None) == ()):
        try:
            return number_text(value)
        except UnusableRecord as error:
            raise UnusableRecord(f"field {theirs!r} (source.{ours}): {error}") from None
    kind = "null" if value is None else "list" if is_list(value) else type(value).__name__
    raise UnusableRecord(f"field {theirs!r} (source.{ours}) must be text, not {kind}")
