"""Opens what a data config describes: its tokenizer, its examples and its streams of batches, cached or made anew."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from common.data.config import DataConfig, fitted_needs
from common.data.examples import Examples, MixedExamples, PieceExamples, RecordExamples, Unread
from common.data.loader import Loader
from common.data.objectives.apply import fields
from common.data.objectives.config import CausalLM, FullLM, Single, Supervised, mode_names, raw_parts
from common.data.packing import RowPlans
from common.data.sources.by_name import downloaded, open_source
from common.data.sources.config import SourceConfig, SourceMixture, parts_of
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
        _loaded_tokenizer(config, cache_dir)
    sources = tuple(_open(part, part.train_split, cache_dir) for part in parts_of(config.source))
    return sources[0] if len(sources) == 1 else JoinedSource(sources)


def open_tokenizer_of(config: DataConfig, source: Source, cache_dir: Path) -> Tokenizer:
    """Opens a config's tokenizer: loaded, prepared, or trained on `source`, the result of `open_training_text`."""
    if config.tokenizer.path is not None:
        return _loaded_tokenizer(config, cache_dir)
    modes = mode_names(config.objective)
    kept = kept_tokenizer(config.tokenizer, source.content_id, modes, cache_dir)
    return open_tokenizer(config.tokenizer, source, cache_dir, modes) if kept is None else kept


def keep_origins(
    config: DataConfig, source: Source, tokenizer: Tokenizer, cache_dir: Path, scored: Sequence[str], to: str
) -> None:
    """Writes the tokenizer and a description of each split to `to`, the folder or url of their tokens.

    Runs then need nothing but `to`.

    Args:
      source: the result of `open_training_text`.
      scored: splits whose texts are written too.
    """
    keep_tokenizer(to, config.tokenizer, source.content_id, mode_names(config.objective), tokenizer)
    for part in parts_of(config.source):
        for split in dict.fromkeys((part.train_split, part.validation_split, *scored)):
            keep_source(to, part, split, _open(part, split, cache_dir), with_text=split in scored)


def _loaded_tokenizer(config: DataConfig, cache_dir: Path) -> Tokenizer:
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
    """Opens the rows of the validation splits; a mixture keeps the rates of its first stage."""
    parts = _parts(config, [part.validation_split for part in parts_of(config.source)], tokenizer, cache_dir)
    mixture = config.source
    if isinstance(mixture, SourceMixture):
        rates = mixture.rates([part.size for part in parts])
        _check_rates(mixture, [part.validation_split for part in mixture.parts], parts, rates)
        return _loader(config, MixedExamples(parts, rates, config.seed), cache_dir, host)
    return _loader(config, parts[0], cache_dir, host)


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
    assert isinstance(config.objective, Supervised | CausalLM)
    return _records(config, part, _open(part, split, cache_dir), tokenizer, cache_dir, config.seed, False)


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


def _parts(config: DataConfig, splits: Sequence[str], tokenizer: Tokenizer, cache_dir: Path) -> list[Examples]:
    """Opens the examples of each part's split, with seeds of their own."""
    mixed = isinstance(config.source, SourceMixture)
    return [
        _examples(config, part, config.seed + (i << 48), _open(part, split, cache_dir), tokenizer, cache_dir, mixed)
        for i, (part, split) in enumerate(zip(parts_of(config.source), splits, strict=True))
    ]


def _examples(
    config: DataConfig,
    part: SourceConfig,
    seed: int,
    source: Source,
    tokenizer: Tokenizer,
    cache_dir: Path,
    mixed: bool,
) -> Examples:
    """Opens the examples of one source. `mixed`: it is a part of a mixture."""
    objective = config.objective
    if isinstance(objective, Supervised | CausalLM):
        return _records(config, part, source, tokenizer, cache_dir, seed, mixed).examples
    denoisers = raw_parts(objective)
    tasks = [_task(part, source, denoiser.objective, tokenizer) for denoiser in denoisers]
    prepared = {key: _prepared(task, cache_dir) for key, task in {task.key(): task for task in tasks}.items()}
    several = len(denoisers) > 1
    made: list[Examples] = []
    for i, (denoiser, task) in enumerate(zip(denoisers, tasks, strict=True)):
        mode = mode_ids(tokenizer, denoiser.mode)
        # Mode ids take input slots from the piece, which may then be too small.
        needs = fitted_needs(denoiser.objective, config.input_length - len(mode), config.target_length)
        examples = PieceExamples(
            prepared[task.key()].fields["text"],
            piece=needs.piece,
            objective=denoiser.objective,
            seed=seed + (i << 32),
            tokenizer=tokenizer,
            source_content_id=source.content_id,
            mode=mode,
            mixed=mixed or several,
        )
        made.append(examples)
    return MixedExamples(made, [denoiser.rate for denoiser in denoisers], seed) if several else made[0]


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
    """Returns the task that tokenises what an objective reads of a source."""
    end_each = isinstance(objective, FullLM)
    return ShardTask(
        source=source, fields=fields(objective), tokenizer=tokenizer, end_each=end_each, strict=part.strict
    )


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
    return Loader(examples, plans, rows=config.rows, share=host.rows)
