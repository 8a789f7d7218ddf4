"""Stores tokenised text: the ids of all records, end to end, over any number of shards. Files are memory-mapped.

Legend: E records, P tokens of all records end to end.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from common.data.ragged import Ragged
from common.errors import UserError

TOKENS = "{shard:05d}.{field}.tokens.npy"
OFFSETS = "{shard:05d}.{field}.offsets.npy"
KEPT = "{shard:05d}.kept.npy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredShard:
    """One field of a shard that a `ShardWriter` wrote. Each of its files is opened on first use."""

    local_path: Callable[[str], Path]
    """Maps a file's name to its path on this machine, fetching the file if necessary."""
    shard: int
    field: str
    records: int
    tokens: int

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, i: int) -> np.ndarray:
        return self.tokens_P[self.offsets[i] : self.offsets[i + 1]]

    @functools.cached_property
    def tokens_P(self) -> np.ndarray:
        """The ids of all records, uint16 or int32."""
        return self._mapped(TOKENS, self.tokens)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64 [E+1]: record i is `tokens_P[offsets[i]:offsets[i+1]]`."""
        return self._mapped(OFFSETS, self.records + 1)

    def _mapped(self, name: str, count: int) -> np.ndarray:
        path = self.local_path(name.format(shard=self.shard, field=self.field))
        try:
            # A plain array over the mapped file slices faster than np.memmap.
            found = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, EOFError):
            found = np.zeros(0)
        if found.shape != (count,):
            raise UserError(f"{path} is damaged: it does not hold the {count} numbers that its manifest records")
        return found


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """One field of all records, over all shards."""

    shards: tuple[Ragged | StoredShard, ...]

    @classmethod
    def of(cls, records: Iterable[Iterable[int]]) -> "TokenStream":
        """Makes a stream in memory from lists of ids.

        >>> stream = TokenStream.of([[5, 6], [], [7]])
        >>> len(stream), stream.tokens, stream.slice(1, 3).tolist(), stream.lengths(np.array([2, 0])).tolist()
        (3, 3, [6, 7], [1, 2])
        """
        return cls((Ragged.of(records),))

    @classmethod
    def open(cls, local_path: Callable[[str], Path], field: str, sizes: Sequence[tuple[int, int]]) -> "TokenStream":
        """Opens one field of the shards that `ShardWriter`s wrote. No file is opened before it is read.

        Args:
          local_path: maps a file's name to its path on this machine, for example `folder.joinpath`.
          sizes: (records, tokens) of each shard.
        """
        shards = [
            StoredShard(local_path=local_path, shard=shard, field=field, records=records, tokens=tokens)
            for shard, (records, tokens) in enumerate(sizes)
        ]
        return cls(tuple(shards))

    def __len__(self) -> int:
        return int(self._first_record[-1])

    @property
    def tokens(self) -> int:
        """Tokens of all records together."""
        return int(self._first_token[-1])

    def __getitem__(self, record: int) -> np.ndarray:
        """Returns the ids of one record."""
        shard, within = _find_shard(self._first_record, record)
        return self.shards[shard][within]

    def lengths(self, records_E: np.ndarray) -> np.ndarray:
        """Returns the token count of each record, int64 [E]."""
        shard_E = np.searchsorted(self._first_record, records_E, side="right") - 1
        out_E = np.empty(len(records_E), np.int64)
        for shard in np.unique(shard_E).tolist():
            (members,) = np.nonzero(shard_E == shard)
            offsets, within = self.shards[shard].offsets, records_E[members] - self._first_record[shard]
            out_E[members] = offsets[within + 1] - offsets[within]
        return out_E

    def slice(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop - 1` of all records end to end, across shards."""
        shard, within = _find_shard(self._first_token, start)
        found = self.shards[shard].tokens_P[within : within + stop - start]
        if len(found) == stop - start:
            return found
        return np.concatenate([found, self.slice(start + len(found), stop)])

    @functools.cached_property
    def _first_record(self) -> np.ndarray:
        return np.cumsum([0, *(len(shard) for shard in self.shards)])

    @functools.cached_property
    def _first_token(self) -> np.ndarray:
        return np.cumsum(
            [0, *(shard.tokens if isinstance(shard, StoredShard) else len(shard.tokens_P) for shard in self.shards)]
        )


class ShardWriter:
    """Writes one field of a shard: appends ids to a flat .npy file, whose header gets its length at the end."""

    def __init__(self, folder: Path, shard: int, field: str, vocab_size: int) -> None:
        """Ids are less than `vocab_size`, which determines their width: 2 or 4 bytes."""
        self._path = folder / TOKENS.format(shard=shard, field=field)
        self._offsets_path = folder / OFFSETS.format(shard=shard, field=field)
        self._dtype = "<u2" if vocab_size <= 1 << 16 else "<i4"
        self._file = self._path.open("wb")
        self._lengths: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._write_header(0)

    def append(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Appends one record for each array; returns their lengths, int64."""
        self._lengths.append(np.array([len(a) for a in arrays], np.int64))
        self._file.write(np.concatenate([np.zeros(0, np.int32), *arrays]).astype(self._dtype).tobytes())
        return self._lengths[-1]

    def close(self) -> int:
        """Writes offsets and header; returns the number of tokens."""
        offsets = np.cumsum(np.concatenate(self._lengths))
        np.save(self._offsets_path, offsets)
        size = self._file.tell()
        self._file.seek(0)
        self._write_header(int(offsets[-1]))
        self._file.close()
        # NumPy pads headers so that the length may grow; a longer header would have overwritten data.
        assert np.load(self._path, mmap_mode="r").nbytes + self._data_start == size
        return int(offsets[-1])

    def _write_header(self, length: int) -> None:
        fields = {"descr": self._dtype, "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(self._file, fields)
        self._data_start = self._file.tell()


def _find_shard(firsts: np.ndarray, n: int) -> tuple[int, int]:
    """Returns (shard, offset in it) of record or token n. Shard i begins at `firsts[i]`."""
    shard = int(np.searchsorted(firsts, n, side="right")) - 1
    if not 0 <= shard < len(firsts) - 1:
        raise IndexError(f"{n} of {firsts[-1]}")
    return shard, n - int(firsts[shard])
