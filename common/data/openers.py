"""Opens what the arms of a config read: sources, their tokens, and the examples that objectives make of them."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from common.data.config import DataConfig, fitted_needs
from common.data.examples import Examples, PieceExamples, RecordExamples
from common.data.joint import Cut, TextExamples, joint_cut
from common.data.mixed_examples import MixedExamples
from common.data.objectives.apply import fields
from common.data.objectives.config import CausalLM, FullLM, Single, Supervised, raw_parts
from common.data.sources.by_name import downloaded, open_source
from common.data.sources.config import SourceConfig, SourceMixture, parts_of
from common.data.sources.file_sources import records_id
from common.data.sources.records import Record, Source
from common.data.tokenized.origins import kept_source
from common.data.tokenized.prepare import open_tokenized, warn_of_problems
from common.data.tokenized.prepared import VARIABLE, Prepared
from common.data.tokenized.shards import ShardTask
from common.data.tokenizers.tokenizer import Tokenizer, mode_ids
from common.errors import UserError
from common.terminal import harmless

_log = logging.getLogger(__name__)


def open_split(part: SourceConfig, split: str, cache_dir: Path) -> Source:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
    """One split of a source, as records and as examples."""

    source: Source
    prepared: Prepared
    examples: RecordExamples

    def text(self, place: int) -> Record:
        """Returns the record at this place, as text."""
        return self.source[self.prepared.source_record(place)]


@dataclasses.dataclass(frozen=True)
class Opener:
    """Opens the examples of one arm."""

    config: DataConfig
    tokenizer: Tokenizer
    cache_dir: Path
    cut: Cut | None
    """What is an example in every arm of a joint plan; None: the config's objective alone decides."""

    def objectives(self) -> list[Single]:
        """Returns the objective, or those that it mixes."""
        objective = self.config.objective
        if isinstance(objective, Supervised | CausalLM):
            return [objective]
        return [part.objective for part in raw_parts(objective)]

    def task(self, part: SourceConfig, source: Source, objective: Single) -> ShardTask:
        """Returns the task that tokenises what an objective reads of a source."""
        ended = isinstance(objective, FullLM) or (self.cut is not None and self.cut.ended)
        return ShardTask(
            source=source, fields=fields(objective), tokenizer=self.tokenizer, end_each=ended, strict=part.strict
        )

    def parts(self, splits: Sequence[str]) -> list[Examples]:
        """Opens one split of each part of the source. Each part has its own seed."""
        parts = parts_of(self.config.source)
        seeds = [self.config.seed + (i << 48) for i in range(len(parts))]
        return [self._examples(*each) for each in zip(parts, splits, seeds, strict=True)]

    def records(self, part: SourceConfig, split: str, seed: int, *, mixed: bool) -> Records:
        """Opens one split for an objective over whole records. `mixed`: its examples are part of a mixture."""
        objective = self.config.objective
        assert isinstance(objective, Supervised | CausalLM)
        source = open_split(part, split, self.cache_dir)
        prepared = _open_prepared(self.task(part, source, objective), self.cache_dir)
        examples = RecordExamples(
            prepared.fields,
            objective=objective,
            seed=seed,
            tokenizer=self.tokenizer,
            source_content_id=source.content_id,
            mixed=mixed,
            records_id=_records_id(part, source),
            source_records=prepared.source_records,
        )
        return Records(source=source, prepared=prepared, examples=examples)

    def _examples(self, part: SourceConfig, split: str, seed: int) -> Examples:
        mixed = isinstance(self.config.source, SourceMixture)
        if isinstance(self.config.objective, Supervised | CausalLM):
            return self.records(part, split, seed, mixed=mixed).examples
        source = open_split(part, split, self.cache_dir)
        if self.cut is None:
            return self._pieces(part, source, seed, mixed=mixed)
        return self._joint_texts(part, source, self.cut, seed, mixed=mixed)

    def _joint_texts(self, part: SourceConfig, source: Source, cut: Cut, seed: int, *, mixed: bool) -> Examples:
        """Opens the examples of an objective over pieces, cut as those of all arms are."""
        (objective,) = (each.objective for each in raw_parts(self.config.objective))
        prepared = _open_prepared(self.task(part, source, objective), self.cache_dir)
        if cut.piece is not None:
            return PieceExamples(
                prepared.fields["text"],
                piece=cut.piece,
                objective=objective,
                seed=seed,
                tokenizer=self.tokenizer,
                source_content_id=source.content_id,
                mixed=mixed,
                ended=cut.ended,
                paired=cut.paired,
            )
        return TextExamples(
            prepared.fields["text"],
            longest=fitted_needs(objective, self.config.input_length, self.config.target_length).piece,
            objective=objective,
            seed=seed,
            tokenizer=self.tokenizer,
            source_content_id=source.content_id,
            records_id=_records_id(part, source),
            source_records=prepared.source_records,
            mixed=mixed,
        )

    def _pieces(self, part: SourceConfig, source: Source, seed: int, *, mixed: bool) -> Examples:
        """Opens the pieces of text of one source; a mixture of objectives cuts the same tokens once for each."""
        denoisers = raw_parts(self.config.objective)
        tasks = [self.task(part, source, denoiser.objective) for denoiser in denoisers]
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


def openers_of(config: DataConfig, tokenizer: Tokenizer, cache_dir: Path) -> list[Opener]:
    """Returns the opener of this config, then those of the other arms of a joint plan.

    Raises UserError for a tokenizer with too few sentinels.
    """
    arms = config.arms()
    for arm in arms:
        arm.check_sentinels(tokenizer.sentinels)
    cut = joint_cut(arms) if len(arms) > 1 else None
    return [Opener(arm, tokenizer, cache_dir, cut) for arm in arms]


def _records_id(part: SourceConfig, source: Source) -> str:
    return records_id(source.content_id, part.fields(), templated=bool(part.templates))


def _open_prepared(task: ShardTask, cache_dir: Path) -> Prepared:
    """Opens a task's tokens, with a warning about skipped records."""
    prepared = open_tokenized(task, cache_dir)
    warn_of_problems(task, prepared)
    return prepared
