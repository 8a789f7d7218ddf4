"""Divides a source without splits into train, validation and test, by a hash of each record's text."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.data.built_in.shares import split_by_hash
from common.data.cache import build_once
from common.data.sources.files import parse_split, slice_bounds
from common.data.sources.indexes import map_integers, write_integers
from common.data.sources.records import Problem, Record, Source, SourceBase, check_range, in_batches
from common.errors import UserError, nearest
from common.progress import counter

FORMAT = 1
"""Part of the cache's key: raise it with any change of how records are assigned to splits."""
MILLION = 10**6
RECORDS_AT_ONCE = 2048
SPLITS = ("train", "validation", "test")
CODES = "splits"
"""Temporary file of one byte per record: the number of its split."""
CODES_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DividedSource(SourceBase):
    """One split of a source, or a slice of one."""

    content_id: str
    whole: Source
    record_numbers: Path
    """int64 .npy file: the numbers in `whole` of the split's records."""
    low: int
    """First record of the slice, within the split."""
    high: int
    """End of the slice."""

    def __len__(self) -> int:
        return self.high - self.low

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        check_range(indices, len(self))
        return self.whole.read(map_integers(self.record_numbers)[np.asarray(indices, np.int64) + self.low].tolist())


def open_divided(
    whole: Source, split: str, held_out: float, hashed_fields: Sequence[str], cache_dir: Path
) -> DividedSource:
    """Opens one split of `whole`, or a slice of one. The first call reads all records to divide them.

    Args:
      whole: the source to divide.
      split: "train", "validation" or "test", or a slice of one.
      held_out: the share of the validation split; the test split has as large a share.
      hashed_fields: our names of the fields whose hash decides. Unusable records go to train, which reports them.
      cache_dir: the folder for everything that can be rebuilt.

    Raises UserError for any other split, and for one without records.
    """
    base, start, stop = parse_split(split)
    if base not in SPLITS:
        raise UserError(f"held_out makes no split {base!r}; {nearest(base, SPLITS)}")
    held = round(held_out * MILLION)
    shares = {"train": MILLION - 2 * held, "validation": held, "test": held}
    divided = f"of {MILLION} parts {held} held out by {'+'.join(hashed_fields)}"
    key = hashlib.blake2b(json.dumps([FORMAT, whole.content_id, divided]).encode(), digest_size=16).hexdigest()
    folder = build_once(cache_dir / "splits" / key, lambda part: _write_splits(whole, shares, hashed_fields, part))
    count = len(map_integers(folder / f"{base}.npy"))
    if not count:
        raise UserError(f"held_out={held_out:g} of {len(whole)} records leaves split {base!r} empty; hold out more")
    low, high = slice_bounds(start, stop, count)
    return DividedSource(
        content_id=f"{split} {divided}: {whole.content_id}",
        whole=whole,
        record_numbers=folder / f"{base}.npy",
        low=low,
        high=high,
    )


def _write_splits(whole: Source, shares: dict[str, int], hashed_fields: Sequence[str], folder: Path) -> None:
    """Writes the record numbers of each split to `folder`/SPLIT.npy, without holding all of them in memory."""
    folder.mkdir()
    with open(folder / CODES, "wb") as codes, counter("dividing into splits", len(whole)) as tick:
        for batch in in_batches(whole, range(len(whole)), RECORDS_AT_ONCE):
            codes.write(bytes(SPLITS.index(_split_of(record, shares, hashed_fields)) for record in batch))
            tick(len(batch))
    for code, split in enumerate(SPLITS):
        write_integers(folder / f"{split}.npy", _numbers_with_code(folder / CODES, code))
    (folder / CODES).unlink()


def _split_of(record: Record | Problem, shares: dict[str, int], hashed_fields: Sequence[str]) -> str:
    if isinstance(record, Problem):
        return "train"
    return split_by_hash("\x1f".join(record[field] for field in hashed_fields), shares)


def _numbers_with_code(path: Path, code: int) -> Iterator[np.ndarray]:
    """Yields, in pieces, the positions in a file of the bytes equal to `code`."""
    begin = 0
    with open(path, "rb") as codes:
        while some := codes.read(CODES_AT_ONCE):
            yield begin + np.flatnonzero(np.frombuffer(some, np.uint8) == code)
            begin += len(some)
