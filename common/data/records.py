"""What a source is: records by number, some of which may turn out to be unusable."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

Record = dict[str, str]
"""Our name of a field -> its text."""


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
