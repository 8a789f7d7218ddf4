"""Reads a comparison's run directory. A missing or broken file raises an error that names it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import UserError
from common.files import plain_name
from common.json_text import parse_json
from common.report.results import ArmResult
from common.train.run_files import ExperimentFiles, RunFiles
from common.train.schema import check_schema

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """One step: a line of `metrics.jsonl`, as far as reports read it."""

    step: int
    loss: float | None = None
    """None for a skipped batch."""
    tokens: int
    flops: float
    fingerprint: str
    validation_loss: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimingRow:
    """One step: a line of `timings.jsonl`, as far as reports read it."""

    step: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredSample:
    """One decoded example: a line of `samples.jsonl`."""

    split: str
    inputs: str
    target: str
    prediction: str
    correct: bool
    group: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRun:
    """Everything that a report shows of one arm."""

    name: str
    result: ArmResult
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: tuple[MetricsRow, ...]
    timings: tuple[TimingRow, ...]
    samples: tuple[ScoredSample, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonRun:
    """A comparison's run directory; arms are in the experiment's order."""

    experiment: Mapping[str, Any]
    arms: tuple[ArmRun, ...]
    """The arms that have a result."""
    unfinished: tuple[str, ...] = ()
    """Names of the arms that have none."""

    @property
    def results(self) -> tuple[ArmResult, ...]:
        return tuple(arm.result for arm in self.arms)


def read_run(run_dir: Path) -> ComparisonRun:
    """Reads RUN/experiment.json and the folder of each arm with a result; the keys of its "arms" name the folders.

    Raises `UserError` naming the file, and the line if it has lines, if one is missing, unreadable or malformed.
    """
    path = run_dir / ExperimentFiles.EXPERIMENT
    experiment = _read_versioned(path)
    arms = experiment.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise UserError(f'{path}: has no "arms"; run the comparison again in a fresh run directory')
    for name in arms:
        plain_name(name, f"{path}: arms")
    done = [name for name in arms if (run_dir / name / RunFiles.RESULT).exists()]
    if not done:
        raise UserError(f"{run_dir} has no finished arm: repeat the run's command, which resumes it")
    return ComparisonRun(
        experiment=experiment,
        arms=tuple(_read_arm(run_dir / name) for name in done),
        unfinished=tuple(name for name in arms if name not in done),
    )


def _read_arm(arm_dir: Path) -> ArmRun:
    from pydantic import TypeAdapter

    result = arm_dir / RunFiles.RESULT
    return ArmRun(
        name=arm_dir.name,
        result=_parse(TypeAdapter(ArmResult), _read_text(result), result),
        config=_read_versioned(arm_dir / RunFiles.CONFIG),
        environment=_read_object(arm_dir / RunFiles.ENVIRONMENT),
        metrics=_read_lines(MetricsRow, arm_dir / RunFiles.METRICS),
        timings=_read_lines(TimingRow, arm_dir / RunFiles.TIMINGS),
        samples=_read_lines(ScoredSample, arm_dir / RunFiles.SAMPLES),
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run is not finished; repeat its command, which resumes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_remedy(path)}") from None


def _remedy(path: Path) -> str:
    what = "it" if path.name == ExperimentFiles.EXPERIMENT else f"the folder {path.parent}"
    return f"delete {what} and repeat the run's command"


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {_remedy(path)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; {_remedy(path)}")
    return value


def _read_versioned(path: Path) -> dict[str, Any]:
    """Reads a JSON object whose schema version this code knows."""
    found = _read_object(path)
    check_schema(found, path)
    return found


def _read_lines(line_type: type[T], path: Path) -> tuple[T, ...]:
    from pydantic import TypeAdapter

    adapter = TypeAdapter(line_type)
    # splitlines() would also split at U+2028 and the like, which JSON need not escape.
    lines = enumerate(_read_text(path).split("\n"), start=1)
    return tuple(_parse(adapter, line, path, f" line {number}") for number, line in lines if line.strip())


def _parse(adapter: "TypeAdapter[T]", text: str, path: Path, place: str = "") -> T:
    from pydantic import ValidationError

    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}{place}: {field + ': ' if field else ''}{first['msg']}; {_remedy(path)}") from None
