"""A source of records in memory, which counts its reads and can be sent to other processes."""

import dataclasses
from collections.abc import Sequence

from common.data.sources.records import Problem, Record
from common.errors import UserError


@dataclasses.dataclass
class MemorySource:
    records: list[Record | Problem]
    content_id: str = "memory 1"
    reads: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        found = self.read([index])[0]
        if isinstance(found, Problem):
            raise UserError(str(found))
        return found

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        self.reads += len(indices)
        return [self.records[index] for index in indices]
