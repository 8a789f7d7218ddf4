"""The texts on which trained models are scored.

Legend: E chosen examples.
"""

import collections
import dataclasses
import functools
from typing import Any

import numpy as np

from common.config import from_earlier_json, to_json
from common.data.cache import default_cache_dir
from common.data.config import DataConfig
from common.data.sources.config import SourceConfig, parts_of
from common.data.sources.records import Record
from common.data.streams import Records, open_records
from common.data.tokenizers.tokenizer import Tokenizer
from common.errors import UserError
from common.evals.in_training import count_in_training
from common.evals.measure import InTraining
from common.evals.text_metrics import check_groups
from common.sharding.hosts import on_first_process
from experiments.run import Run

OPEN_TESTS = 8
"""How many sets of scored splits a process keeps open."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredSplit:
    """The records of one split that models decode."""

    part: SourceConfig
    records: Records
    chosen_E: np.ndarray
    """Example numbers, evenly spaced over the split."""
    in_training: InTraining
    """How many of these records are also in the training data."""

    def texts(self) -> list[Record]:
        return [self.records.text(place) for place in self.records.examples.order.place(self.chosen_E).tolist()]


def open_tests(run: Run, tokenizer: Tokenizer) -> dict[str, ScoredSplit]:
    """Opens all splits on which the run is scored, by name; a mixture has a split for each part.

    Runs that are scored on the same texts share what this returns. Raises UserError for an unknown split, and for a
    group whose score would have the name of the whole split's.
    """
    scored = _Scored(
        data=dataclasses.replace(run.data, seed=0),  # decides which examples are chosen: the same ones for all seeds
        splits=run.evaluation.splits,
        examples=run.evaluation.examples,
        tokenizer_hash=tokenizer.content_hash,
        tokenizer=tokenizer,
    )
    return _open_tests(scored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scored:
    """What a run is scored on. Runs that agree in it share their open splits."""

    data: DataConfig
    splits: tuple[str, ...]
    examples: int
    tokenizer_hash: str
    tokenizer: Tokenizer = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=OPEN_TESTS)
def _open_tests(scored: _Scored) -> dict[str, ScoredSplit]:
    named = [
        (f"{split}{suffix}", part, split)
        for part, suffix in _parts(scored.data)
        for split in dict.fromkeys(scored.splits)
    ]
    opened = {name: _open(scored, part, split) for name, part, split in named}
    chosen = {name: _chosen(records, scored.examples, name) for name, records in opened.items()}
    known = on_first_process(lambda: _find_in_training(scored, opened, chosen))
    tests = {
        name: ScoredSplit(
            part=part,
            records=opened[name],
            chosen_E=chosen[name],
            in_training=from_earlier_json(InTraining, known[name]),
        )
        for name, part, _ in named
    }
    for name, test in tests.items():
        if test.part.group is not None:
            check_groups([text.get("group") for text in test.texts()], name)
    return tests


def _parts(data: DataConfig) -> list[tuple[SourceConfig, str]]:
    """Returns each part of the source, with a suffix for the names of its splits.

    Where parts have the same source, the suffix contains their number within the mixture.
    """
    parts = parts_of(data.source)
    if len(parts) == 1:
        return [(parts[0], "")]
    named = collections.Counter(part.name for part in parts)
    numbered = {number: f" (part {number})" if named[part.name] > 1 else "" for number, part in enumerate(parts, 1)}
    return [(part, f" of {part.name}{numbered[number]}") for number, part in enumerate(parts, 1)]


def _open(scored: _Scored, part: SourceConfig, split: str) -> Records:
    return open_records(scored.data, part, split, scored.tokenizer, default_cache_dir())


def _chosen(records: Records, most: int, name: str) -> np.ndarray:
    """Returns the numbers of at most so many examples to score. Raises UserError if there are none."""
    size = records.examples.size
    if not size:
        raise UserError(f"split {name} has no examples to score")
    return np.linspace(0, size - 1, min(most, size)).astype(np.int64)


def _find_in_training(scored: _Scored, opened: dict[str, Records], chosen: dict[str, np.ndarray]) -> dict[str, Any]:
    """Searches the training data of all parts; returns an `InTraining` as JSON for each split."""
    parts = parts_of(scored.data.source) if opened else ()
    train = [_open(scored, part, part.train_split).prepared.fields for part in parts]
    return {
        name: to_json(
            count_in_training(
                train, records.prepared.fields, records.examples.order.place(chosen[name]), scored.tokenizer.unk_id
            )
        )
        for name, records in opened.items()
    }
