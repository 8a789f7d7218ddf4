"""`twinstack data prepare`: tokenizes all splits of a study before it is run."""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.config import to_json
from common.data.cache import default_cache_dir
from common.data.config import DataConfig
from common.data.streams import keep_origins, open_tokenizer_of, open_training_text, shard_tasks
from common.data.tokenized.beam import parse_options, prepare_with_beam
from common.data.tokenized.prepare import make, open_tokenized, write_all
from common.data.tokenized.prepared import PROBLEMS, VARIABLE
from common.data.tokenized.remote import check_destination, destination
from common.data.tokenized.shards import ShardTask
from common.terminal import harmless, marked_up
from experiments.study import Study

WIDEST = 1000
"""Characters; the table may be wider than the terminal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedSplit:
    """A tokenized split."""

    split: str
    manifest: dict
    where: str
    """Folder or URL of the tokens."""
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Read:
    """Data that arms of a study read, whatever their seeds and rows."""

    config: DataConfig
    arms: list[str]
    scored: dict[str, None]
    """Splits that one of the arms is scored on, in order."""


def prepare_data(
    study: Study,
    console: Console,
    *,
    workers: int | None = None,
    to: str | None = None,
    beam: Sequence[str] | None = None,
) -> None:
    """Trains the tokenizers and tokenizes all splits, unless they are there already, and prints a table of them.

    Arms usually read the same data; otherwise each data config gets a table of its own.

    Args:
      workers: number of processes; None: one per core.
      to: folder or URL for the tokens; None: the cache.
      beam: options of an Apache Beam pipeline that tokenizes; None: tokenize on this machine.

    Raises UserError where the data cannot be opened or `to` cannot be written.
    """
    if to is not None:
        check_destination(to)
    if beam is not None:
        parse_options(beam)
    found = _read_by(study)
    for data in found:
        if len(found) > 1:
            console.print(f"data of {harmless(', '.join(data.arms))}:", markup=False, highlight=False, soft_wrap=True)
        _prepare_one(data, console, workers, to, beam)
    if to is not None:
        console.print(
            harmless(f"runs read these tokens with {VARIABLE}={to}, and need nothing else"),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _read_by(study: Study) -> list[_Read]:
    """Returns the data of all arms, each once: the tokens are the same for every seed and number of rows."""
    found: dict[str, _Read] = {}
    for name, run in study.arms.items():
        key = json.dumps(to_json(dataclasses.replace(run.data, seed=0, rows=1)))
        data = found.setdefault(key, _Read(config=run.data, arms=[], scored={}))
        data.arms.append(name)
        data.scored.update(dict.fromkeys(run.evaluation.splits))
    return list(found.values())


def _prepare_one(
    data: _Read, console: Console, workers: int | None, to: str | None, beam: Sequence[str] | None
) -> None:
    cache_dir, config, scored = default_cache_dir(), data.config, tuple(data.scored)
    source = open_training_text(config, cache_dir)
    tokenizer = open_tokenizer_of(config, source, cache_dir)
    console.print(f"tokenizer: {tokenizer.vocab_size:,} ids, hash {tokenizer.content_hash}", highlight=False)
    made = []
    for split, task in shard_tasks(config, tokenizer, cache_dir, scored):
        begin = time.perf_counter()
        manifest, where = _prepare(task, cache_dir, workers, to, beam)
        name = f"{split}, eos after each" if task.end_each else split
        made.append(PreparedSplit(split=name, manifest=manifest, where=where, seconds=time.perf_counter() - begin))
    shown = table(made)
    shown.width = console.measure(shown, options=console.options.update(max_width=WIDEST)).maximum
    console.print(shown, crop=False)  # so a narrow terminal folds lines, and cuts nothing
    for each in made:
        if problems := each.manifest["problems"]:
            line = f"{each.split}: {problems['count']:,} of {each.manifest['records']:,} records are skipped: "
            line += f"{'; '.join(problems['first'])}; all: {each.where}/{PROBLEMS}"
            console.print(harmless(line), markup=False, highlight=False, soft_wrap=True)
    if to is not None:
        keep_origins(config, source, tokenizer, cache_dir, scored, to)


def table(made: Sequence[PreparedSplit]) -> Table:
    """Returns a table with a row for each split."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("split", "records", "kept", "empty", "tokens", "skipped", "MB", "seconds", "folder"):
        table.add_column(name, justify="left" if name in ("split", "folder") else "right")
    for each in made:
        manifest = each.manifest
        tokens = [f"{field} {count:,}" for field, count in manifest["tokens"].items()]
        table.add_row(
            Text(harmless(each.split)),
            *(f"{manifest[name]:,}" for name in ("records", "kept", "empty")),
            marked_up("\n".join(tokens)),
            f"{manifest['problems'].get('count', 0):,}",
            f"{manifest['bytes'] / 1e6:,.2f}",
            f"{each.seconds:,.1f}",
            Text(harmless(each.where)),
        )
    return table


def _prepare(
    task: ShardTask, cache_dir: Path, workers: int | None, to: str | None, beam: Sequence[str] | None
) -> tuple[dict, str]:
    """Returns the manifest, and the folder or URL that contains it."""
    if to is None:
        prepared = open_tokenized(task, cache_dir, workers)
        return prepared.manifest, str(prepared.where)
    there = destination(to, task)
    if beam is None:
        return make(task, there, functools.partial(write_all, workers=workers)), str(there)
    return prepare_with_beam(task, there, beam), str(there)
