"""What `fit` takes: a setup with its data, and an observer."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from common.data.batch import HostBatch
from common.train.config import InitRule
from common.train.programs import Setup
from common.train.stored import StoredParameters


class Stream(Protocol):
    """Batches by number; `common.data.loader.Loader` is one."""

    @property
    def content(self) -> str:
        """Identifies the stream's data; the chained fingerprint starts from it."""
        ...

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        """Yields batches `start` to `stop - 1`, counted from 0."""
        ...


class Seeker(Protocol):
    """Helps a stream to continue at a batch without reading everything before it again."""

    def landmarks(self, step: int) -> tuple[int, ...]:
        """Returns what `recall` needs once `step` batches have been read; a checkpoint keeps it."""
        ...

    def recall(self, landmarks: Sequence[int]) -> None:
        """Takes the landmarks of a checkpoint before reading continues; empty if it has none."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initial:
    """Where a new run's parameters come from."""

    open: Callable[[], StoredParameters]
    """Called once, and only if the run has no checkpoint of its own."""
    rules: tuple[InitRule, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A setup with its data."""

    setup: Setup
    stream: Stream
    seeker: Seeker | None = None
    """None if the stream finds any batch at once."""
    validation: tuple[HostBatch, ...]
    config: dict[str, Any]
    """The resolved config as JSON, by which a run directory is recognised."""
    complete_config: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Adds the fields that a `config` written by an earlier version lacks."""
    data: dict[str, str]
    """Identifies the training data: content id of the source, hash of the tokenizer."""
    tokenizer_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    """Name and content of the tokenizer's files, which the run directory keeps from the start."""
    initial: Initial | None = None
    """None for a fresh model."""
    peak_flops_per_second: float | None = None
    """Peak of one device; None if unknown, and then utilisation is not recorded."""
    profile_steps: int = 0
    """How many steps to trace for a profiler, after the warm-up."""


class Watcher(Protocol):
    """Observes a run, for example to show its progress."""

    def note(self, message: str) -> None:
        """Takes one line for the user."""
        ...

    def begin(self, step: int, steps: int) -> None:
        """Is called before training starts or resumes after `step` of `steps`."""
        ...

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        """Takes a step's rows of `metrics.jsonl` and `timings.jsonl` as they are written."""
        ...
