"""Tokenising on many machines: the same shards as `common.data.tokenized.prepare` makes, by an Apache Beam pipeline.

Workers need this package, and the source's files under the names that they have here (a shared disk, or a TFDS folder
in a bucket). They put shards at the destination themselves: nothing but shards' numbers goes through Beam.
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
    """The manifest of what lies at the destination; where there is none, a pipeline makes the shards that are missing.

    Args:
      options: Beam's own, each as "--name=value" or "--name", for example "--runner=DataflowRunner".

    Raises UserError where Beam is not installed, for an option that Beam does not know, where the pipeline fails, and
    for a record that cannot be used where the task is strict.
    """
    parsed = parse_options(options)
    return make(task, destination, lambda task, destination: _run(task, destination, parsed))


def parse_options(options: Sequence[str]) -> Any:
    """Beam's `PipelineOptions`. Raises UserError where Beam is not installed, or does not know one of them."""
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "Apache Beam is not installed: pip install apache-beam (for Dataflow: apache-beam[gcp])"
        ) from error
    for option in options:
        if not option.startswith("--"):
            raise UserError(f"{option!r} is no option of Beam's; each is --name=value or --name, and ours stand before")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            known = PipelineOptions([]).get_all_options().keys()
            given = PipelineOptions(list(options)).get_all_options(retain_unknown_options=True).keys()
        except SystemExit:  # as argparse does
            raise UserError(f"options of Beam's: {said.getvalue().rpartition('error: ')[2].strip()}") from None
    for name in sorted(given - known):
        close = nearest(name, known).partition("?")
        raise UserError(f"Beam has no option --{name}" + (f"; {close[0]}?" if close[1] else ""))
    return PipelineOptions(list(options))


def _run(task: ShardTask, destination: Destination, options: Any) -> list[ShardReport]:
    import apache_beam as beam

    numbers = range(task.shards())
    try:
        pipeline = beam.Pipeline(options=options)
        shards = pipeline | "shards" >> beam.Create(numbers) | "apart" >> beam.Reshuffle()
        # Bound: Beam checks arguments of a Map against their annotations, which no Protocol can stand.
        _ = shards | "tokenise" >> beam.Map(functools.partial(_write, task=task, destination=destination))
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:  # every runner has errors of its own
        raise UserError(f"the Beam pipeline failed: {_cause(error)}") from error
    counts = {found.key.metric.name: found.result for found in result.metrics().query()["counters"]}
    _log.info("Beam counted %s", ", ".join(f"{counts.get(name, 0)} {name}" for name in COUNTERS))
    return [destination.write(number, task, lambda done: None) for number in numbers]  # which reads their reports


def _write(number: int, task: ShardTask, destination: Destination) -> None:
    """On a worker."""
    from apache_beam.metrics import Metrics

    records, kept, problems = (Metrics.counter("twinstack", name) for name in COUNTERS)
    report = destination.write(number, task, records.inc)
    kept.inc(report.kept)
    problems.inc(len(report.problems))


def _cause(error: Exception) -> str:
    """What a worker's own error says, where there is one in a runner's report of many lines."""
    told = re.findall(r"\bUserError: (.+)", str(error))
    return re.sub(r" \[while running .*?\]", "", told[-1] if told else " ".join(str(error).split()))
