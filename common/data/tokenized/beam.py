"""Tokenises on many machines: an Apache Beam pipeline makes the same shards as `common.data.tokenized.prepare`.

Workers need this package, and the source's files at the same paths or URLs as here (on a shared disk, or a TFDS folder
in a bucket). They write shards straight to the destination, which must be shared too: Beam carries only the task and
shard numbers to them, and counters back.
"""

import contextlib
import functools
import io
import logging
import re
from collections.abc import Sequence
from typing import Any

from common.data.tokenized.prepare import Destination, make
from common.data.tokenized.shards import ShardReport, ShardTask
from common.errors import UserError, nearest

COUNTERS = ("records", "kept", "problems")
"""Beam's counters: records read, records that could be used, and records that could not."""

_log = logging.getLogger(__name__)


def prepare_with_beam(task: ShardTask, destination: Destination, options: Sequence[str]) -> dict:
    """Returns the manifest of the source at the destination; if it is not complete, a pipeline makes what is missing.

    Args:
      options: Beam's options, each as "--name=value" or "--name", for example "--runner=DataflowRunner".

    Raises UserError if Beam is not installed or does not know an option, if the pipeline fails, or if a strict task has
    a record that cannot be used.
    """
    parsed = parse_options(options)
    return make(task, destination, lambda task, destination: _run_pipeline(task, destination, parsed))


def parse_options(options: Sequence[str]) -> Any:
    """Parses options to Beam's `PipelineOptions`. Raises UserError if Beam is not installed or an option is wrong."""
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "Apache Beam is not installed: pip install apache-beam (for Dataflow: apache-beam[gcp])"
        ) from error
    for option in options:
        if not option.startswith("--"):
            raise UserError(
                f"{option!r} is not an option of Beam: those are --name=value or --name; put all else before --beam"
            )
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            known = PipelineOptions([]).get_all_options().keys()
            given = PipelineOptions(list(options)).get_all_options(retain_unknown_options=True).keys()
        except SystemExit:  # from argparse, which has printed its usage and then "error: ..."
            raise UserError(f"Beam's options: {printed.getvalue().rpartition('error: ')[2].strip()}") from None
    for name in sorted(given - known):
        suggestion, question_mark, _ = nearest(name, known).partition("?")  # after it come Beam's hundreds of options
        raise UserError(f"Beam has no option --{name}" + (f"; {suggestion}?" if question_mark else ""))
    return PipelineOptions(list(options))


def _run_pipeline(task: ShardTask, destination: Destination, options: Any) -> list[ShardReport]:
    """Runs the pipeline to its end; returns the report of every shard, in order."""
    import apache_beam as beam

    every_shard = range(task.shards())
    try:
        pipeline = beam.Pipeline(options=options)
        shards = pipeline | "shards" >> beam.Create(every_shard) | "apart" >> beam.Reshuffle()
        # A partial, because Beam checks other arguments of Map against their annotations, which fails where that is a
        # Protocol, as Destination is.
        _ = shards | "tokenise" >> beam.Map(functools.partial(_write_shard, task=task, destination=destination))
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:  # each runner has its own kinds of errors
        raise UserError(f"the Beam pipeline failed: {_cause(error)}") from error
    counts = {found.key.metric.name: found.result for found in result.metrics().query()["counters"]}
    _log.info("Beam counted %s", ", ".join(f"{counts.get(name, 0)} {name}" for name in COUNTERS))
    # Every shard is there by now, so `write` only checks it and reads its report.
    return [destination.write(shard, task, lambda done: None) for shard in every_shard]


def _write_shard(shard: int, task: ShardTask, destination: Destination) -> None:
    """Writes one shard and adds to the counters; runs on a worker."""
    from apache_beam.metrics import Metrics

    records, kept, problems = (Metrics.counter("twinstack", name) for name in COUNTERS)
    report = destination.write(shard, task, records.inc)
    kept.inc(report.kept)
    problems.inc(len(report.problems))


def _cause(error: Exception) -> str:
    """Returns the cause of a runner's error, whose text holds the worker's traceback, in one line.

    This is the message of the worker's UserError if there is one, else the whole text.
    """
    messages = re.findall(r"\bUserError: (.+)", str(error))
    return re.sub(r" \[while running .*?\]", "", messages[-1] if messages else " ".join(str(error).split()))
