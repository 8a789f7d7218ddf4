"""Tokenises on many machines: an Apache Beam pipeline makes the same shards as `common.data.tokenized.prepare`.

Workers need this package, and the source's files under the same names as here (a shared disk, or a TFDS folder in a
bucket). They write shards to the destination themselves; Beam passes around which shards to write, and counters.
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

_log = logging.getLogger(__name__)


def prepare_with_beam(task: ShardTask, destination: Destination, options: Sequence[str]) -> dict:
    """Returns the manifest of the source at the destination, after a pipeline has made the missing shards.

    Args:
      options: Beam's options, each as "--name=value" or "--name", for example "--runner=DataflowRunner".

    Raises UserError if Beam is not installed or does not know an option, if the pipeline fails, and for a record that a
    strict task cannot use.
    """
    parsed = parse_options(options)
    return make(task, destination, lambda task, destination: _run(task, destination, parsed))


def parse_options(options: Sequence[str]) -> Any:
    """Parses Beam's `PipelineOptions`. Raises UserError if Beam is not installed or does not know one of them."""
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "Apache Beam is not installed: pip install apache-beam (for Dataflow: apache-beam[gcp])"
        ) from error
    for option in options:
        if not option.startswith("--"):
            raise UserError(
                f"{option!r} is not an option of Beam, which are --name=value or --name; ours come before them"
            )
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            known = PipelineOptions([]).get_all_options().keys()
            given = PipelineOptions(list(options)).get_all_options(retain_unknown_options=True).keys()
        except SystemExit:  # from argparse
            raise UserError(f"Beam's options: {printed.getvalue().rpartition('error: ')[2].strip()}") from None
    for name in sorted(given - known):
        close = nearest(name, known).partition("?")
        raise UserError(f"Beam has no option --{name}" + (f"; {close[0]}?" if close[1] else ""))
    return PipelineOptions(list(options))


def _run(task: ShardTask, destination: Destination, options: Any) -> list[ShardReport]:
    """Runs the pipeline to its end."""
    import apache_beam as beam

    every_shard = range(task.shards())
    try:
        pipeline = beam.Pipeline(options=options)
        shards = pipeline | "shards" >> beam.Create(every_shard) | "apart" >> beam.Reshuffle()
        # partial: Beam checks the arguments of a Map against their annotations, which fails for a Protocol.
        _ = shards | "tokenise" >> beam.Map(functools.partial(_write, task=task, destination=destination))
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:  # each runner has its own kinds of errors
        raise UserError(f"the Beam pipeline failed: {_cause(error)}") from error
    counts = {found.key.metric.name: found.result for found in result.metrics().query()["counters"]}
    _log.info("Beam counted %s", ", ".join(f"{counts.get(name, 0)} {name}" for name in COUNTERS))
    return [destination.write(shard, task, lambda done: None) for shard in every_shard]  # reads the reports


def _write(shard: int, task: ShardTask, destination: Destination) -> None:
    """Writes one shard, on a worker."""
    from apache_beam.metrics import Metrics

    records, kept, problems = (Metrics.counter("twinstack", name) for name in COUNTERS)
    report = destination.write(shard, task, records.inc)
    kept.inc(report.kept)
    problems.inc(len(report.problems))


def _cause(error: Exception) -> str:
    """Returns the message of the worker's UserError, if the runner's report of many lines contains one."""
    messages = re.findall(r"\bUserError: (.+)", str(error))
    return re.sub(r" \[while running .*?\]", "", messages[-1] if messages else " ".join(str(error).split()))
