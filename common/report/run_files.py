"""Reads what a comparison left in its run directory; a missing or broken file is an error that names it."""

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
    """One step's line of `metrics.jsonl`, as far as reports read it."""

    step: int
    loss: float | None = None
    """None for a batch that was left out."""
    tokens: int
    flops: float
    fingerprint: str
    validation_loss: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimingRow:
    """One step's line of `timings.jsonl`, as far as reports read it."""

    step: int
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One decoded example, a line of `samples.jsonl`."""

    split: str
    inputs: str
    target: str
    prediction: str
    correct: bool
    group: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmRun:
    """Everything an arm left behind that a report shows."""

    name: str
    result: ArmResult
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: tuple[MetricsRow, ...]
    timings: tuple[TimingRow, ...]
    samples: tuple[Sample, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A comparison's run directory; arms in the experiment's order."""

    experiment: Mapping[str, Any]
    arms: tuple[ArmRun, ...]
    """Those that have a result."""
    unfinished: tuple[str, ...] = ()
    """Names of the others."""

    @property
    def results(self) -> tuple[ArmResult, ...]:
        return tuple(arm.result for arm in self.arms)


def read_run(run_dir: Path) -> Run:
    """Reads RUN/experiment.json and the folder of each arm that it names (keys of its "arms") and that has a result.

    Raises `UserError` naming the file, and the line where it has lines, for whatever is missing, unreadable or not of
    the expected form.
    """
    path = run_dir / ExperimentFiles.EXPERIMENT
    experiment = _read_described(path)
    arms = experiment.get("arms")
    if not isinstance(arms, dict) or not arms:
        raise UserError(f'{path}: has no "arms"; run the comparison again in a fresh run directory')
    for name in arms:
        plain_name(name, f"{path}: arms")
    done = [name for name in arms if (run_dir / name / RunFiles.RESULT).exists()]
    if not done:
        raise UserError(f"{run_dir} has no finished arm: repeat the run's command, which resumes it")
    return Run(
        experiment=experiment,
        arms=tuple(_read_arm(run_dir / name) for name in done),
        unfinished=tuple(name for name in arms if name not in done),
    )


def _read_arm(arm_dir: Path) -> ArmRun:
    from pydantic import TypeAdapter

    result = arm_dir / RunFiles.RESULT
    return ArmRun(
        name=arm_dir.name,
        result=_parse(TypeAdapter(ArmResult), _read(result), result),
        config=_read_described(arm_dir / RunFiles.CONFIG),
        environment=_read_object(arm_dir / RunFiles.ENVIRONMENT),
        metrics=_read_rows(MetricsRow, arm_dir / RunFiles.METRICS),
        timings=_read_rows(TimingRow, arm_dir / RunFiles.TIMINGS),
        samples=_read_rows(Sample, arm_dir / RunFiles.SAMPLES),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run is not finished; repeat its command, which resumes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_mend(path)}") from None


def _mend(path: Path) -> str:
    what = "it" if path.name == ExperimentFiles.EXPERIMENT else f"the folder {path.parent}"
    return f"delete {what} and repeat the run's command"


def _read_object(path: Path) -> dict[str, Any]:
    text = _read(path)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {_mend(path)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object; {_mend(path)}")
    return value


def _read_described(path: Path) -> dict[str, Any]:
    found = _read_object(path)
    check_schema(found, path)
    return found


def _read_rows(row_type: type[T], path: Path) -> tuple[T, ...]:
    from pydantic import TypeAdapter

    adapter = TypeAdapter(row_type)
    # split("\n"), not splitlines(): a text may hold U+2028 and its like, which need no escape in JSON
    lines = enumerate(_read(path).split("\n"), start=1)
    return tuple(_parse(adapter, line, path, f" line {number}") for number, line in lines if line.strip())


def _parse(adapter: "TypeAdapter[T]", text: str, path: Path, place: str = "") -> T:
    from pydantic import ValidationError

    try:
        return adapter.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}{place}: {field + ': ' if field else ''}{first['msg']}; {_mend(path)}") from None
