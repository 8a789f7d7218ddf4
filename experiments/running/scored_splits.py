"""The texts on which trained models are scored.

Legend: E chosen examples.
"""

import collections
import dataclasses
import functools
import json
from typing import Any

import numpy as np

from common.config import from_earlier_json, to_json
from common.data.cache import default_cache_dir
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
    return _open_tests(_Scored(run, tokenizer))


class _Scored:
    """A run and its tokenizer, equal to all others that are scored on the same tokens.

    The seed of the data is set to 0: it decides which examples are chosen, and those are the same for all seeds.
    """

    def __init__(self, run: Run, tokenizer: Tokenizer):
        self.run, self.tokenizer = dataclasses.replace(run, data=dataclasses.replace(run.data, seed=0)), tokenizer
        chosen = (run.evaluation.splits, run.evaluation.examples)
        self._key = json.dumps([to_json(self.run.data), *chosen, tokenizer.content_hash])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Scored) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=OPEN_TESTS)
def _open_tests(scored: _Scored) -> dict[str, ScoredSplit]:
    run, tokenizer = scored.run, scored.tokenizer
    named = [
        (f"{split}{suffix}", part, split)
        for part, suffix in _parts(run)
        for split in dict.fromkeys(run.evaluation.splits)
    ]
    opened = {name: _open(run, part, split, tokenizer) for name, part, split in named}
    chosen = {name: _chosen(run, records, name) for name, records in opened.items()}
    known = on_first_process(lambda: _find_in_training(run, opened, chosen, tokenizer))
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


def _parts(run: Run) -> list[tuple[SourceConfig, str]]:
    """Returns each part of the source, with a suffix for the names of its splits.

    Where parts have the same source, the suffix contains their number within the mixture.
    """
    parts = parts_of(run.data.source)
    if len(parts) == 1:
        return [(parts[0], "")]
    named = collections.Counter(part.name for part in parts)
    numbered = {number: f" (part {number})" if named[part.name] > 1 else "" for number, part in enumerate(parts, 1)}
    return [(part, f" of {part.name}{numbered[number]}") for number, part in enumerate(parts, 1)]


def _open(run: Run, part: SourceConfig, split: str, tokenizer: Tokenizer) -> Records:
    return open_records(run.data, part, split, tokenizer, default_cache_dir())


def _chosen(run: Run, records: Records, name: str) -> np.ndarray:
    """Returns the numbers of the examples to score. Raises UserError if there are none."""
    size = records.examples.size
    if not size:
        raise UserError(f"split {name} has no examples to score")
    return np.linspace(0, size - 1, min(run.evaluation.examples, size)).astype(np.int64)


def _find_in_training(
    run: Run, opened: dict[str, Records], chosen: dict[str, np.ndarray], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Searches the training data of all parts; returns an `InTraining` as JSON for each split."""
    parts = parts_of(run.data.source) if opened else ()
    train = [_open(run, part, part.train_split, tokenizer).prepared.fields for part in parts]
    return {
        name: to_json(
            count_in_training(
                train, records.prepared.fields, records.examples.order.place(chosen[name]), tokenizer.unk_id
            )
        )
        for name, records in opened.items()
    }
