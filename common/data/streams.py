"""Opens what a data config describes: its tokenizer, its examples and its streams of batches, cached or made anew."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from common.data.config import DataConfig, fitted_needs
from common.data.examples import Examples, PieceExamples, RecordExamples
from common.data.loader import Loader
from common.data.mixed_examples import MixedExamples, Unread
from common.data.objectives.apply import fields
from common.data.objectives.config import CausalLM, FullLM, Single, Supervised, mode_names, raw_parts
from common.data.packing import RowPlans
from common.data.sources.by_name import downloaded, open_source
from common.data.sources.config import SourceConfig, SourceMixture, parts_of
from common.data.sources.file_sources import records_id
from common.data.sources.records import Record, Source
from common.data.sources.templates import JoinedSource
from common.data.staged_loader import StagedLoader
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
    """The share of each batch that this process makes."""

    rows: Sequence[int] | None = None
    """Its rows of a batch, from 0; None: all."""


def open_training_text(config: DataConfig, cache_dir: Path) -> Source:
    """Opens the training splits of all parts, joined: the text that a tokenizer is trained on.

    A tokenizer that is a file is read first, so that a wrong path fails before a source is made, which may take long.
    """
    if config.tokenizer.path is not None:
        _load_tokenizer_or_kept(config, cache_dir)
    sources = tuple(_open(part, part.train_split, cache_dir) for part in parts_of(config.source))
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


def open_tokenizer_of(config: DataConfig, source: Source, cache_dir: Path) -> Tokenizer:
    """Opens a config's tokenizer: loaded, prepared, or trained on `source`, the result of `open_training_text`."""
    if config.tokenizer.path is not None:
        return _load_tokenizer_or_kept(config, cache_dir)
    modes = mode_names(config.objective)
    kept = kept_tokenizer(config.tokenizer, source.content_id, modes, cache_dir)
    return open_tokenizer(config.tokenizer, source, cache_dir, modes) if kept is None else kept


def keep_origins(
    config: DataConfig, source: Source, tokenizer: Tokenizer, cache_dir: Path, scored: Sequence[str], to: str
) -> None:
    """Writes the tokenizer and a description of each split to `to`, the folder or URL of their tokens.

    Runs then need nothing but `to`.

    Args:
      source: the result of `open_training_text`.
      scored: splits whose texts are written too.
    """
    keep_tokenizer(to, config.tokenizer, source.content_id, mode_names(config.objective), tokenizer)
    for part in parts_of(config.source):
        for split in dict.fromkeys((part.train_split, part.validation_split, *scored)):
            keep_source(to, part, split, _open(part, split, cache_dir), with_text=split in scored)


def _load_tokenizer_or_kept(config: DataConfig, cache_dir: Path) -> Tokenizer:
    """Loads the tokenizer from its file or, if that is absent, from the prepared data."""
    try:
        return load_tokenizer(config.tokenizer)
    except UserError:
        kept = kept_tokenizer(config.tokenizer, "", mode_names(config.objective), cache_dir)
        if kept is None:
            raise
        return kept


def _open(part: SourceConfig, split: str, cache_dir: Path) -> Source:
    """Opens a split from its own files or, if that fails, from its description in the prepared data.

    The description comes first for a TFDS data set that would have to be downloaded.
    """
    if downloaded(part.name) and (kept := kept_source(part, split)) is not None:
        return kept
    try:
        return open_source(part, split, cache_dir)
    except UserError as error:
        if (kept := kept_source(part, split)) is None:
            raise
        _warn_described(harmless(f"{part.name} {split}"), harmless(str(error)))
        return kept


@functools.cache
def _warn_described(name: str, why: str) -> None:
    _log.warning("%s: only its description in $%s is available: %s", name, VARIABLE, why)


def shard_tasks(
    config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, more_splits: Sequence[str] = ()
) -> list[tuple[str, ShardTask]]:
    """Returns every tokenising task that the streams of a config need, once each, as (name, task).

    The name is that of the split, followed by that of the part if the source is a mixture.

    Args:
      more_splits: splits of every part besides training and validation.

    Raises UserError as opening the streams does.
    """
    config.check_sentinels(tokenizer.sentinels)
    found: dict[str, tuple[str, ShardTask]] = {}
    parts = parts_of(config.source)
    objective = config.objective
    if isinstance(objective, Supervised | CausalLM):
        objectives: list[Single] = [objective]
    else:
        objectives = [part.objective for part in raw_parts(objective)]
    for part in parts:
        for split in dict.fromkeys((part.train_split, part.validation_split, *more_splits)):
            source = _open(part, split, cache_dir)
            for each in objectives:
                task = _task(part, source, each, tokenizer)
                found.setdefault(task.key(), (split if len(parts) == 1 else f"{split} of {part.name}", task))
    return list(found.values())


def open_training(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, host: Host) -> "Loader | StagedLoader":
    """Opens the training stream. Raises UserError for a tokenizer with too few sentinels."""
    config.check_sentinels(tokenizer.sentinels)
    opener, mixture = _Opener(config, tokenizer, cache_dir), config.source
    splits = [part.train_split for part in parts_of(mixture)]
    parts = opener.parts(splits)
    if isinstance(mixture, SourceConfig):
        return opener.loader(parts[0], host)
    rates = [mixture.rates([part.size for part in parts]), *(stage.rates for stage in mixture.curriculum)]
    for each in rates:
        _check_rates(mixture, splits, parts, each)

    def open_stage(stage: int, unread: Sequence[Unread] | None) -> tuple[MixedExamples, Loader]:
        examples = MixedExamples(parts, rates[stage], config.seed, unread)
        return examples, opener.loader(examples, host)

    return StagedLoader([0, *(stage.from_step for stage in mixture.curriculum)], open_stage)


def open_validation(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, host: Host) -> Loader:
    """Opens the rows of the validation splits; a mixture keeps the rates of its first stage."""
    opener, mixture = _Opener(config, tokenizer, cache_dir), config.source
    splits = [part.validation_split for part in parts_of(mixture)]
    parts = opener.parts(splits)
    if isinstance(mixture, SourceConfig):
        return opener.loader(parts[0], host)
    rates = mixture.rates([part.size for part in parts])
    _check_rates(mixture, splits, parts, rates)
    return opener.loader(MixedExamples(parts, rates, config.seed), host)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """One split of a source, as records and as examples."""

    source: Source
    prepared: Prepared
    examples: RecordExamples

    def text(self, place: int) -> Record:
        """Returns the record at this place, as text."""
        return self.source[self.prepared.source_record(place)]


def open_records(config: DataConfig, part: SourceConfig, split: str, tokenizer: Tokenizer, cache_dir: Path) -> Records:
    """Opens one split of a source for an objective over whole records."""
    return _Opener(config, tokenizer, cache_dir).records(part, split, config.seed, mixed=False)


@dataclasses.dataclass(frozen=True)
class _Opener:
    """Opens the examples and loaders of one config."""

    config: DataConfig
    tokenizer: Tokenizer
    cache_dir: Path

    def parts(self, splits: Sequence[str]) -> list[Examples]:
        """Opens one split of each part of the source. Each part has its own seed."""
        parts = parts_of(self.config.source)
        seeds = [self.config.seed + (i << 48) for i in range(len(parts))]
        return [self._examples(*each) for each in zip(parts, splits, seeds, strict=True)]

    def records(self, part: SourceConfig, split: str, seed: int, *, mixed: bool) -> Records:
        """Opens one split for an objective over whole records. `mixed`: its examples are part of a mixture."""
        objective = self.config.objective
        assert isinstance(objective, Supervised | CausalLM)
        source = _open(part, split, self.cache_dir)
        prepared = _open_prepared(_task(part, source, objective, self.tokenizer), self.cache_dir)
        examples = RecordExamples(
            prepared.fields,
            objective=objective,
            seed=seed,
            tokenizer=self.tokenizer,
            source_content_id=source.content_id,
            mixed=mixed,
            records_id=records_id(source.content_id, part.fields(), templated=bool(part.templates)),
            source_records=prepared.source_records,
        )
        return Records(source=source, prepared=prepared, examples=examples)

    def loader(self, examples: Examples, host: Host) -> Loader:
        """Opens the batches of these examples."""
        if not examples.size:
            raise UserError("the source has no examples to pack")
        plans = RowPlans(
            examples,
            input_limit=self.config.input_length,
            target_limit=self.config.target_length,
            seed=self.config.seed,
            cache_dir=self.cache_dir,
        )
        return Loader(examples, plans, rows=self.config.rows, share=host.rows)

    def _examples(self, part: SourceConfig, split: str, seed: int) -> Examples:
        mixed = isinstance(self.config.source, SourceMixture)
        if isinstance(self.config.objective, Supervised | CausalLM):
            return self.records(part, split, seed, mixed=mixed).examples
        return self._pieces(part, _open(part, split, self.cache_dir), seed, mixed=mixed)

    def _pieces(self, part: SourceConfig, source: Source, seed: int, *, mixed: bool) -> Examples:
        """Opens the pieces of text of one source; a mixture of objectives cuts the same tokens once for each."""
        denoisers = raw_parts(self.config.objective)
        tasks = [_task(part, source, denoiser.objective, self.tokenizer) for denoiser in denoisers]
        prepared = {key: _open_prepared(task, self.cache_dir) for key, task in {t.key(): t for t in tasks}.items()}
        several = len(denoisers) > 1
        made: list[Examples] = []
        for i, (denoiser, task) in enumerate(zip(denoisers, tasks, strict=True)):
            mode = mode_ids(self.tokenizer, denoiser.mode)
            # Mode ids take input slots from the piece, which may then be too small.
            input_length = self.config.input_length - len(mode)
            examples = PieceExamples(
                prepared[task.key()].fields["text"],
                piece=fitted_needs(denoiser.objective, input_length, self.config.target_length).piece,
                objective=denoiser.objective,
                seed=seed + (i << 32),
                tokenizer=self.tokenizer,
                source_content_id=source.content_id,
                mode=mode,
                mixed=mixed or several,
            )
            made.append(examples)
        return MixedExamples(made, [denoiser.rate for denoiser in denoisers], seed) if several else made[0]


def _check_rates(
    mixture: SourceMixture, splits: Sequence[str], parts: Sequence[Examples], rates: Sequence[float]
) -> None:
    """Raises UserError for a part that has a positive rate but no examples."""
    for i, (source, split, examples, rate) in enumerate(zip(mixture.parts, splits, parts, rates, strict=True)):
        if rate and not examples.size:
            raise UserError(
                f"source.parts[{i}] ({source.name}) has no examples in split {split!r}, but rate {rate:g}: "
                "give it a larger split, or rate 0"
            )


def _task(part: SourceConfig, source: Source, objective: Single, tokenizer: Tokenizer) -> ShardTask:
    """Returns the task that tokenises what an objective reads of a source."""
    end_each = isinstance(objective, FullLM)
    return ShardTask(
        source=source, fields=fields(objective), tokenizer=tokenizer, end_each=end_each, strict=part.strict
    )


def _open_prepared(task: ShardTask, cache_dir: Path) -> Prepared:
    """Opens a task's tokens, with a warning about skipped records."""
    prepared = open_tokenized(task, cache_dir)
    warn_of_problems(task, prepared)
    return prepared
