"""Opens what a data config describes: its tokenizer, its examples and its streams of batches, cached or made anew."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from common.data.config import DataConfig
from common.data.examples import Examples
from common.data.joint import JointLengths
from common.data.loader import Loader
from common.data.mixed_examples import MixedExamples, Unread
from common.data.objectives.config import mode_names
from common.data.openers import Opener, Records, open_split, openers_of
from common.data.packing import RowPlans
from common.data.sources.config import SourceConfig, SourceMixture, parts_of
from common.data.sources.records import Source
from common.data.sources.templates import JoinedSource
from common.data.staged_loader import StagedLoader
from common.data.tokenized.origins import keep_source, keep_tokenizer, kept_tokenizer
from common.data.tokenized.shards import ShardTask
from common.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Host:
    """The share of each batch that this process makes."""

    rows: Sequence[int] | None = None
    """Its rows of a batch, from 0; None: all."""


def open_training_text(config: DataConfig, cache_dir: Path) -> Source:
    """Opens the training splits of all parts, joined: the text that a tokenizer is trained on.

    If the arms of a joint plan read it by other fields or templates, their texts are joined too, in the same order for
    every arm. A tokenizer that is a file is read first, so that a wrong path fails before a source is made, which may
    take long.
    """
    if config.tokenizer.path is not None:
        _load_tokenizer_or_kept(config, cache_dir)
    arms = [[open_split(part, part.train_split, cache_dir) for part in parts_of(arm.source)] for arm in config.arms()]
    sources, known = arms[0], {source.content_id: source for source in itertools.chain(*arms)}
    if len(known) > len({source.content_id for source in sources}):
        sources = [known[content_id] for content_id in sorted(known)]
    return sources[0] if len(sources) == 1 else JoinedSource(tuple(sources))


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
    for i, part in ((i, part) for i, arm in enumerate(config.arms()) for part in parts_of(arm.source)):
        for split in dict.fromkeys((part.train_split, part.validation_split, *(() if i else scored))):
            keep_source(to, part, split, open_split(part, split, cache_dir), with_text=split in scored)


def _load_tokenizer_or_kept(config: DataConfig, cache_dir: Path) -> Tokenizer:
    """Loads the tokenizer from its file or, if that is absent, from the prepared data."""
    try:
        return load_tokenizer(config.tokenizer)
    except UserError:
        kept = kept_tokenizer(config.tokenizer, "", mode_names(config.objective), cache_dir)
        if kept is None:
            raise
        return kept


def shard_tasks(
    config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, more_splits: Sequence[str] = ()
) -> list[tuple[str, ShardTask]]:
    """Returns every tokenising task that the streams of a config need, once each, as (name, task).

    A joint plan also needs the lengths, so the tokens, of the other arms. The name is that of the split, followed by
    that of the part if the source is a mixture.

    Args:
      more_splits: splits of every part besides training and validation, as this config reads them.

    Raises UserError as opening the streams does.
    """
    found: dict[str, tuple[str, ShardTask]] = {}
    for i, opener in enumerate(openers_of(config, tokenizer, cache_dir)):
        parts = parts_of(opener.config.source)
        for part in parts:
            for split in dict.fromkeys((part.train_split, part.validation_split, *(() if i else more_splits))):
                source = open_split(part, split, cache_dir)
                for each in opener.objectives():
                    task = opener.task(part, source, each)
                    found.setdefault(task.key(), (split if len(parts) == 1 else f"{split} of {part.name}", task))
    return list(found.values())


def open_training(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, host: Host) -> "Loader | StagedLoader":
    """Opens the training stream. Raises UserError for a tokenizer with too few sentinels."""
    openers, mixture = openers_of(config, tokenizer, cache_dir), config.source
    splits = [part.train_split for part in parts_of(mixture)]
    parts = [opener.parts(splits) for opener in openers]
    if isinstance(mixture, SourceConfig):
        return _loader(openers, [part for (part,) in parts], host)
    rates = [mixture.rates([part.size for part in parts[0]]), *(stage.rates for stage in mixture.curriculum)]
    for each in rates:
        _check_rates(mixture, splits, parts[0], each)

    def open_stage(stage: int, unread: Sequence[Unread] | None) -> tuple[MixedExamples, Loader]:
        examples = [MixedExamples(of_arm, rates[stage], config.seed, unread) for of_arm in parts]
        return examples[0], _loader(openers, examples, host)

    return StagedLoader([0, *(stage.from_step for stage in mixture.curriculum)], open_stage)


def open_validation(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path, host: Host) -> Loader:
    """Opens the rows of the validation splits; a mixture keeps the rates of its first stage."""
    openers, mixture = openers_of(config, tokenizer, cache_dir), config.source
    splits = [part.validation_split for part in parts_of(mixture)]
    parts = [opener.parts(splits) for opener in openers]
    if isinstance(mixture, SourceConfig):
        return _loader(openers, [part for (part,) in parts], host)
    rates = mixture.rates([part.size for part in parts[0]])
    _check_rates(mixture, splits, parts[0], rates)
    return _loader(openers, [MixedExamples(of_arm, rates, config.seed) for of_arm in parts], host)


def _loader(openers: Sequence[Opener], examples: Sequence[Examples], host: Host) -> Loader:
    """Opens the batches of the first arm's examples; rows are planned for the examples of all arms."""
    config, own = openers[0].config, examples[0]
    if not own.size:
        raise UserError("the source has no examples to pack")
    slots = [(opener.config.input_length, opener.config.target_length) for opener in openers]
    planned = JointLengths(examples, slots) if len(openers) > 1 else None
    input_limit, target_limit = slots[0] if planned is None else planned.limits
    plans = RowPlans(
        own if planned is None else planned,
        input_limit=input_limit,
        target_limit=target_limit,
        seed=config.seed,
        cache_dir=openers[0].cache_dir,
        shown=None if planned is None else planned.shown,
    )
    return Loader(own, plans, rows=config.rows, share=host.rows, slots=slots[0])


def open_records(config: DataConfig, part: SourceConfig, split: str, tokenizer: Tokenizer, cache_dir: Path) -> Records:
    """Opens one split of a source for an objective over whole records."""
    return Opener(config, tokenizer, cache_dir, None).records(part, split, config.seed, mixed=False)


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
