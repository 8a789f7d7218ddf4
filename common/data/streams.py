"""From a data config to its tokenizer, its examples and its batches: everything is found in the cache, or made."""

import bisect
import dataclasses
import functools
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common.compute.length_sums import LengthSums
from common.data.batch import HostBatch
from common.data.config import DataConfig, fitted_needs
from common.data.examples import Examples, MixedExamples, PieceExamples, RecordExamples, Unread
from common.data.loader import Loader, prefetched
from common.data.objectives.apply import fields
from common.data.objectives.config import CausalLM, FullLM, Single, Supervised, mode_names, raw_parts
from common.data.packing import RowPlans
from common.data.sources.by_name import downloaded, open_source
from common.data.sources.config import SourceConfig, SourceMixture, parts_of
from common.data.sources.records import Record, Source
from common.data.sources.templates import JoinedSource
from common.data.tokenized.origins import keep_source, keep_tokenizer, kept_source, kept_tokenizer
from common.data.tokenized.prepare import open_tokenized, warn_of_problems
from common.data.tokenized.prepared import VARIABLE, Prepared
from common.data.tokenized.shards import ShardTask
from common.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, mode_ids, open_tokenizer
from common.errors import UserError
from common.terminal import harmless

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Host:
    """What this process makes of each batch."""

    rows: Sequence[int] | None = None
    """Numbers of its rows; None: all."""


def open_training_text(config: DataConfig, cache_dir: Path) -> Source:
    """The training splits of all parts, one after the other: what a tokenizer is trained on.

    Where the tokenizer is a file, that is read first: making a source may take long, and the file's name may be wrong.
    """
    if config.tokenizer.path is not None:
        _loaded_tokenizer(config, cache_dir)
    sources = tuple(_open(part, part.train_split, cache_dir) for part in parts_of(config.source))
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


def open_tokenizer_of(config: DataConfig, source: Source, cache_dir: Path) -> Tokenizer:
    """The tokenizer of a data config: loaded, prepared, or trained on `source`, which `open_training_text` returned."""
    if config.tokenizer.path is not None:
        return _loaded_tokenizer(config, cache_dir)
    modes = mode_names(config.objective)
    kept = kept_tokenizer(config.tokenizer, source.content_id, modes, cache_dir)
    return open_tokenizer(config.tokenizer, source, cache_dir, modes) if kept is None else kept


def keep_origins(
    config: DataConfig, source: Source, tokenizer: Tokenizer, cache_dir: Path, scored: Sequence[str], to: str
) -> None:
    """Describes the tokenizer and all splits in `to`, the folder or url of their tokens, which then are enough.

    Args:
      source: which `open_training_text` returned.
      scored: splits whose texts are needed too.
    """
    keep_tokenizer(to, config.tokenizer, source.content_id, mode_names(config.objective), tokenizer)
    for part in parts_of(config.source):
        for split in dict.fromkeys((part.train_split, part.validation_split, *scored)):
            keep_source(to, part, split, _open(part, split, cache_dir), with_text=split in scored)


def _loaded_tokenizer(config: DataConfig, cache_dir: Path) -> Tokenizer:
    """The tokenizer from its file; if that is not here, the prepared one."""
    try:
        return load_tokenizer(config.tokenizer)
    except UserError:
        kept = kept_tokenizer(config.tokenizer, "", mode_names(config.objective), cache_dir)
        if kept is None:
            raise
        return kept


def _open(part: SourceConfig, split: str, cache_dir: Path) -> Source:
    """The split itself; where it cannot be opened here, what prepared data tell of it.

    A data set of TFDS that would have to be downloaded comes after prepared data.
    """
    if downloaded(part.name) and (kept := kept_source(part, split)) is not None:
        return kept
    try:
        return open_source(part, split, cache_dir)
    except UserError as error:
        if (kept := kept_source(part, split)) is None:
            raise
        _say_kept(harmless(f"{part.name} {split}"), harmless(str(error)))
        return kept


@functools.cache
def _say_kept(name: str, why: str) -> None:
    _log.warning("%s is known from $%s alone: %s", name, VARIABLE, why)


def shard_tasks(
    config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, more_splits: Sequence[str] = ()
) -> list[tuple[str, ShardTask]]:
    """All that streams of a config read tokenised, each once, with its split's name (of a mixture, and its part's).

    Args:
      more_splits: read besides the training and the validation split, of every part.

    Raises UserError as opening the streams does.
    """
    config.check_sentinels(tokenizer.sentinels)
    found: dict[str, tuple[str, ShardTask]] = {}
    parts = parts_of(config.source)
    objective = config.objective
    ways: list[Single] = [part.objective for part in raw_parts(objective)]
    if isinstance(objective, Supervised | CausalLM):
        ways = [objective]
    for part in parts:
        for split in dict.fromkeys((part.train_split, part.validation_split, *more_splits)):
            source = _open(part, split, cache_dir)
            for way in ways:
                task = _task(part, source, way, tokenizer)
                found.setdefault(task.key(), (split if len(parts) == 1 else f"{split} of {part.name}", task))
    return list(found.values())


def open_training(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, host: Host) -> "Loader | StagedLoader":
    """The training stream. Raises UserError for a tokenizer with too few sentinels."""
    config.check_sentinels(tokenizer.sentinels)
    parts = _parts(config, [part.train_split for part in parts_of(config.source)], tokenizer, cache_dir)
    mixture = config.source
    if isinstance(mixture, SourceConfig):
        return _loader(config, parts[0], cache_dir, host)
    rates = [mixture.rates([part.size for part in parts]), *(stage.rates for stage in mixture.curriculum)]
    for each in rates:
        _check_rates(mixture, [part.train_split for part in mixture.parts], parts, each)

    def open_stage(stage: int, unread: Sequence[Unread] | None) -> tuple[MixedExamples, Loader]:
        examples = MixedExamples(parts, rates[stage], config.seed, unread)
        return examples, _loader(config, examples, cache_dir, host)

    return StagedLoader([0, *(stage.from_step for stage in mixture.curriculum)], open_stage)


def open_validation(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, host: Host) -> Loader:
    """Rows of the validation splits; of a mixture's, at the rates of its beginning."""
    parts = _parts(config, [part.validation_split for part in parts_of(config.source)], tokenizer, cache_dir)
    mixture = config.source
    if isinstance(mixture, SourceMixture):
        rates = mixture.rates([part.size for part in parts])
        _check_rates(mixture, [part.validation_split for part in mixture.parts], parts, rates)
        return _loader(config, MixedExamples(parts, rates, config.seed), cache_dir, host)
    return _loader(config, parts[0], cache_dir, host)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """One split, record by record and as examples."""

    source: Source
    prepared: Prepared
    examples: RecordExamples

    def text(self, place: int) -> Record:
        """The record that was tokenised as number `place`."""
        return self.source[self.prepared.source_index(place)]


def open_records(config: DataConfig, part: SourceConfig, split: str, tokenizer: Tokenizer, cache_dir: Path) -> Records:
    """One split of a source that an objective over whole records reads."""
    assert isinstance(config.objective, Supervised | CausalLM)
    return _records(config, part, _open(part, split, cache_dir), tokenizer, cache_dir, config.seed, False)


class StagedLoader:
    """Batches of a mixture whose rates change at given steps.

    Every part goes on where the stage before left it: first come the examples that were planned into rows of that
    stage's last window, but that its last step did not come to.
    """

    def __init__(
        self,
        first_steps: Sequence[int],
        open_stage: Callable[[int, Sequence[Unread] | None], tuple[MixedExamples, Loader]],
    ) -> None:
        """`open_stage(stage, unread)`: its examples and loader, from what is unread of each part (None: all)."""
        self._first_steps, self._open = first_steps, open_stage
        self._lock = threading.RLock()
        self._landmarks: list[tuple[int, int]] = []
        self._stages = [open_stage(0, None)]

    @property
    def content(self) -> str:
        """What the stream is read from; a chain of fingerprints starts here."""
        first = self._stages[0][1].content
        return first if len(self._first_steps) == 1 else json.dumps([first, list(self._first_steps)])

    def batch(self, step: int) -> HostBatch:
        """This process's rows of step `step`."""
        stage = self._stage(step)
        return self._loader(stage).batch(step - self._first_steps[stage])

    def iterate(self, start: int, stop: int, *, threads: int = 1, buffered: int = 4) -> Iterator[HostBatch]:
        """Takes what `landmarks` of the same stream returned, as `Loader.recall` does."""
        return prefetched(self.batch, start, stop, threads=threads, buffered=buffered)

    def filled(self) -> tuple[int, LengthSums]:
        """As a `Loader` does, at the beginning."""
        return self._stages[0][1].filled()

    def landmarks(self, step: int) -> tuple[int, ...]:
        """The landmarks of each stage's `Loader`, up to the stage of the step before."""
        last = self._stage(step - 1)
        ends = [*self._first_steps[1 : last + 1], step]
        steps = [end - first for first, end in zip(self._first_steps, ends, strict=False)]
        return tuple(itertools.chain(*(self._loader(stage).landmarks(n) for stage, n in enumerate(steps))))

    def recall(self, landmarks: Sequence[int]) -> None:
        """Takes what `landmarks` of the same stream returned, as `Loader.recall` does."""
        with self._lock:
            self._landmarks = list(zip(landmarks[::2], landmarks[1::2], strict=True))
            for (_, loader), of_stage in zip(self._stages, self._landmarks, strict=False):
                loader.recall(of_stage)

    def _stage(self, step: int) -> int:
        return bisect.bisect_right(self._first_steps, step) - 1

    def _loader(self, stage: int) -> Loader:
        with self._lock:
            while stage >= len(self._stages):
                examples, loader = self._stages[-1]
                last = len(self._stages)
                read = loader.read(self._first_steps[last] - self._first_steps[last - 1])
                self._stages.append(self._open(last, examples.rest(*read)))
                if last < len(self._landmarks):
                    self._stages[last][1].recall(self._landmarks[last])
            return self._stages[stage][1]


def _check_rates(
    mixture: SourceMixture, splits: Sequence[str], parts: Sequence[Examples], rates: Sequence[float]
) -> None:
    """Raises UserError for a part that has no examples, but a rate."""
    for number, (source, split, examples, rate) in enumerate(zip(mixture.parts, splits, parts, rates, strict=True)):
        if rate and not examples.size:
            raise UserError(
                f"source.parts[{number}] ({source.name}) has no examples in split {split!r}, but rate {rate:g}: "
                "give it a larger split, or rate 0"
            )


def _parts(config: DataConfig, splits: Sequence[str], tokenizer: Tokenizer, cache_dir: Path) -> list[Examples]:
    mixed = isinstance(config.source, SourceMixture)
    return [
        _examples(config, part, number, _open(part, split, cache_dir), tokenizer, cache_dir, mixed)
        for number, (part, split) in enumerate(zip(parts_of(config.source), splits, strict=True))
    ]


def _examples(
    config: DataConfig,
    part: SourceConfig,
    number: int,
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: Path,
    mixed: bool,
) -> Examples:
    """Of one source, number `number` of its mixture."""
    seed = config.seed + (number << 48)  # sources draw apart
    objective = config.objective
    if isinstance(objective, Supervised | CausalLM):
        return _records(config, part, source, tokenizer, cache_dir, seed, mixed).examples
    denoisers = raw_parts(objective)
    tasks = [_task(part, source, denoiser.objective, tokenizer) for denoiser in denoisers]
    prepared = {key: _prepared(task, cache_dir) for key, task in {task.key(): task for task in tasks}.items()}
    apart = len(denoisers) > 1
    made: list[Examples] = []
    for number, (denoiser, task) in enumerate(zip(denoisers, tasks, strict=True)):
        mode = mode_ids(tokenizer, denoiser.mode)
        # A mode takes input slots from the piece, so that what fitted may fit no more.
        needs = fitted_needs(denoiser.objective, config.input_length - len(mode), config.target_length)
        examples = PieceExamples(
            prepared[task.key()].fields["text"],
            piece=needs.piece,
            objective=denoiser.objective,
            seed=seed + (number << 32),  # and so do objectives
            tokenizer=tokenizer,
            source_content_id=source.content_id,
            mode=mode,
            mixed=mixed or apart,
        )
        made.append(examples)
    return MixedExamples(made, [denoiser.rate for denoiser in denoisers], seed) if apart else made[0]


def _records(
    config: DataConfig,
    part: SourceConfig,
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: Path,
    seed: int,
    mixed: bool,
) -> Records:
    assert isinstance(config.objective, Supervised | CausalLM)
    prepared = _prepared(_task(part, source, config.objective, tokenizer), cache_dir)
    examples = RecordExamples(
        prepared.fields,
        objective=config.objective,
        seed=seed,
        tokenizer=tokenizer,
        source_content_id=source.content_id,
        mixed=mixed,
    )
    return Records(source=source, prepared=prepared, examples=examples)


def _task(part: SourceConfig, source: Source, objective: Single, tokenizer: Tokenizer) -> ShardTask:
    """What an objective reads of a source."""
    ends = isinstance(objective, FullLM)
    return ShardTask(source=source, fields=fields(objective), tokenizer=tokenizer, end_each=ends, strict=part.strict)


def _prepared(task: ShardTask, cache_dir: Path) -> Prepared:
    prepared = open_tokenized(task, cache_dir)
    warn_of_problems(task, prepared)
    return prepared


def _loader(config: DataConfig, examples: Examples, cache_dir: Path, host: Host) -> Loader:
    if not examples.size:
        raise UserError("the source has no examples to pack")
    plans = RowPlans(
        examples,
        input_limit=config.input_length,
        target_limit=config.target_length,
        seed=config.seed,
        cache_dir=cache_dir,
    )
    return Loader(examples, config, plans, share=host.rows)
