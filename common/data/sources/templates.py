"""Sources on top of others: inputs and targets from templates, and several sources end to end."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np

from common.data.objectives.draws import draw_bits
from common.data.sources.config import Template
from common.data.sources.records import Problem, Record, Source, SourceBase


@dataclasses.dataclass(frozen=True)
class TemplatedSource(SourceBase):
    """A source that makes "inputs" and "targets" from templates.

    Each record's number decides its template, so the choice is the same in every epoch and on every machine.
    """

    records: Source
    templates: tuple[Template, ...]

    @property
    def content_id(self) -> str:
        forms = json.dumps([dataclasses.asdict(template) for template in self.templates], sort_keys=True)
        return f"{self.records.content_id} by templates {hashlib.blake2b(forms.encode(), digest_size=8).hexdigest()}"

    def __len__(self) -> int:
        return len(self.records)

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        found = zip(self.records.read(indices), indices, strict=True)
        return [record if isinstance(record, Problem) else self._render(record, index) for record, index in found]

    def _render(self, record: Record, index: int) -> Record | Problem:
        """Fills a template with a record's fields; a Problem if a target value has no word."""
        drawn = int(draw_bits(0, np.array([index]), 1)[0, 0]) % len(self.templates)
        template = self.templates[drawn]
        targets = dict(record)
        for field in template.fields() if template.words else ():
            if f"{{{field}}}" not in template.targets:
                continue
            if record[field] not in template.words:
                return Problem(
                    f"{self.records.content_id.partition(':blake2b')[0]} record {index}",
                    f"field {field!r} is {record[field][:80]!r}, for which template {drawn} has no word",
                )
            targets[field] = template.words[record[field]]
        made = {"inputs": template.inputs.format_map(record), "targets": template.targets.format_map(targets)}
        return made | {"group": record["group"]} if "group" in record else made


@dataclasses.dataclass(frozen=True)
class JoinedSource(SourceBase):
    """Several sources end to end: all records of the first, then of the second, and so on."""

    sources: tuple[Source, ...]

    @property
    def content_id(self) -> str:
        return " and ".join(source.content_id for source in self.sources)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def read(self, indices: Sequence[int]) -> list[Record | Problem]:
        located = [self._locate(index) for index in indices]
        runs = itertools.groupby(located, lambda pair: pair[0])
        return [record for source, run in runs for record in source.read([within for _, within in run])]

    def _locate(self, index: int) -> tuple[Source, int]:
        """Returns the source of a record, and the record's number in it."""
        within = index
        for source in self.sources:
            if within < len(source):
                return source, within
            within -= len(source)
        raise IndexError(f"record {index} of {len(self)}")
