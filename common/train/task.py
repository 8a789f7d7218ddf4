"""What `fit` is given: a setup with its data, and somebody who looks on."""

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
    def content(self) -> str: ...

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]: ...


class Seeker(Protocol):
    """Finds a place in a stream again that was read before, without reading what lies before it."""

    def landmarks(self, step: int) -> tuple[int, ...]:
        """Returns what `recall` takes after the first `step` batches were read; a checkpoint keeps it."""
        ...

    def recall(self, landmarks: Sequence[int]) -> None:
        """Takes landmarks before batches from that number on are read; empty if a checkpoint has none."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initial:
    """Where a new run's parameters come from."""

    open: Callable[[], StoredParameters]
    """Called once, and only where the run has no checkpoint of its own."""
    rules: tuple[InitRule, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A setup with its data."""

    setup: Setup
    stream: Stream
    seeker: Seeker | None = None
    """The stream's seeker; None: its batches are found at once, wherever they are."""
    validation: tuple[HostBatch, ...]
    config: dict[str, Any]
    """Resolved config of the run, as JSON: what a run directory is recognised by."""
    data: dict[str, str]
    """What is read: content id of the source, hash of the tokenizer."""
    tokenizer_files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    """Name and content of what the run directory keeps of its tokenizer, from before the first step."""
    initial: Initial | None = None
    """None: a fresh model."""
    peak_flops_per_second: float | None = None
    """Of one device; None: not known, so no utilisation is told."""
    profile_steps: int = 0
    """How many steps to trace for a profiler, the first ones left out."""


class Watcher(Protocol):
    """What a run tells whoever looks on."""

    def note(self, message: str) -> None: ...

    def begin(self, step: int, steps: int) -> None: ...

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        """The rows of `metrics.jsonl` and `timings.jsonl` as they are written."""
        ...
