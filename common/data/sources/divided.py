"""Training, validation and test split of one set of files, by a hash of each record's text, as in the built-in data."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.data.built_in.shares import split_by_hash
from common.data.cache import build_once
from common.data.progress import counter
from common.data.sources.files import parse_split, slice_bounds
from common.data.sources.indexes import map_integers, write_integers
from common.data.sources.records import Problem, Record, Source, SourceBase, check_range, in_batches
from common.errors import UserError, nearest

FORMAT = 1
"""Part of the cache's key: raise it with any change of which record is in which split."""
MILLION = 10**6
RECORDS_AT_ONCE = 2048
SPLITS = ("train", "validation", "test")
CODES = "splits"
CODES_AT_ONCE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class DividedSource(SourceBase):
    """The records of one split, or a slice of them."""

    content_id: str
    whole: Source
    numbers: Path
    """A file of the numbers that the split's records have in `whole`."""
    low: int
    """The first place of the slice; `high` is the end."""
    high: int

    def __len__(self) -> int:
        return self.high - self.low

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        check_range(indices, len(self))
        return self.whole.read(map_integers(self.numbers)[np.asarray(indices, np.int64) + self.low].tolist())


def open_divided(whole: Source, split: str, held_out: float, by: Sequence[str], cache_dir: Path) -> DividedSource:
    """One split of `whole`, or a slice of one; who is in which is found out once, by reading all records.

    Args:
      held_out: the share of the validation split, and of the test split.
      by: the fields that are hashed. A record that cannot be used is in the training split, which names it.

    Raises UserError for another split than these three, and where it has no record.
    """
    base, start, stop = parse_split(split)
    if base not in SPLITS:
        raise UserError(f"held_out makes no split {base!r}; {nearest(base, SPLITS)}")
    held = round(held_out * MILLION)
    shares = {"train": MILLION - 2 * held, "validation": held, "test": held}
    divided = f"of {MILLION} parts {held} held out by {'+'.join(by)}"
    key = hashlib.blake2b(json.dumps([FORMAT, whole.content_id, divided]).encode(), digest_size=16).hexdigest()
    folder = build_once(cache_dir / "splits" / key, lambda part: _write_splits(whole, shares, by, part))
    count = len(map_integers(folder / f"{base}.npy"))
    if not count:
        raise UserError(f"held_out={held_out:g} of {len(whole)} records leaves none in {base!r}; hold more out")
    low, high = slice_bounds(start, stop, count)
    return DividedSource(
        content_id=f"{split} {divided}: {whole.content_id}",
        whole=whole,
        numbers=folder / f"{base}.npy",
        low=low,
        high=high,
    )


def _write_splits(whole: Source, shares: dict[str, int], by: Sequence[str], folder: Path) -> None:
    """Writes the numbers of each split's records, which never are in memory all at once."""
    folder.mkdir()
    with open(folder / CODES, "wb") as codes, counter("dividing into splits", len(whole)) as tick:
        for batch in in_batches(whole, range(len(whole)), RECORDS_AT_ONCE):
            codes.write(bytes(SPLITS.index(_split_of(record, shares, by)) for record in batch))
            tick(len(batch))
    for code, split in enumerate(SPLITS):
        write_integers(folder / f"{split}.npy", _numbers_with_code(folder / CODES, code))
    (folder / CODES).unlink()


def _split_of(record: Record | Problem, shares: dict[str, int], by: Sequence[str]) -> str:
    if isinstance(record, Problem):
        return "train"
    return split_by_hash("\x1f".join(record[field] for field in by), shares)


def _numbers_with_code(path: Path, code: int) -> Iterator[np.ndarray]:
    begin = 0
    with open(path, "rb") as codes:
        while some := codes.read(CODES_AT_ONCE):
            yield begin + np.flatnonzero(np.frombuffer(some, np.uint8) == code)
            begin += len(some)
