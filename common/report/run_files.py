"""Reads a study's directory. A missing or broken file raises an error that names it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import UserError
from common.files import plain_name, read_rows
from common.json_text import parse_json
from common.report.claims import Parity
from common.report.results import ArmResult
from common.report.run_list import ListedRun, RunList, Trial
from common.train.run_files import RunFiles, StudyFiles
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
    source_fingerprint: str | None = None
    """Chained over the source examples, whatever the objective makes of them; None where the run recorded none."""
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
class FinishedRun:
    """Everything that a report shows of one run."""

    listed: ListedRun
    result: ArmResult
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    metrics: tuple[MetricsRow, ...]
    timings: tuple[TimingRow, ...]
    samples: tuple[ScoredSample, ...]

    @property
    def name(self) -> str:
        return self.listed.name

    @property
    def arm(self) -> str:
        return self.listed.arm

    @property
    def seed(self) -> int:
        return self.listed.seed

    @property
    def rate(self) -> float:
        return self.trial.rate

    @property
    def trial(self) -> Trial:
        return self.listed.trial


@dataclasses.dataclass(frozen=True, kw_only=True)
class BegunRun:
    """A run that has no result: it is being trained, waits to go on, or failed."""

    listed: ListedRun
    validation_losses: Mapping[int, float]
    """Those it has so far, by step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRuns:
    """A study's directory; runs are in the order of the study's arms, then in that of the list."""

    study: Mapping[str, Any]
    """The study's config: question, search and so on."""
    parity: tuple[Parity, ...]
    listed: RunList
    runs: tuple[FinishedRun, ...]
    """The runs that have a result."""
    begun: tuple[BegunRun, ...] = ()
    """The other runs that have a validation loss; only `read_results` reads them."""

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Names of the runs that have no result."""
        done = {run.name for run in self.runs}
        return tuple(run.name for run in self.listed.runs if run.name not in done)

    @property
    def compared(self) -> tuple[FinishedRun, ...]:
        """The runs by which arms are compared, without the trials of a search.

        While an arm's search goes on, those of its best trial so far.
        """
        compared = [run for run in self.runs if run.listed.compared]
        if not self.study.get("search"):
            return tuple(compared)
        best = {arm: _best_trial([r for r in compared if r.arm == arm]) for arm in {run.arm for run in compared}}
        best |= {arm: choice.trial for arm, choice in self.listed.chosen.items()}
        return tuple(run for run in compared if run.trial == best[run.arm])

    @property
    def by_title(self) -> dict[str, FinishedRun]:
        """The compared runs by the name they are shown under: the arm's if each arm has one run, else the run's."""
        arms = [run.arm for run in self.compared]
        return {run.arm if len(set(arms)) == len(arms) else run.name: run for run in self.compared}

    @property
    def first_seed(self) -> tuple[FinishedRun, ...]:
        """One compared run of each arm, that of the lowest seed."""
        by_arm: dict[str, FinishedRun] = {}
        for run in self.compared:
            if run.arm not in by_arm or run.seed < by_arm[run.arm].seed:
                by_arm[run.arm] = run
        return tuple(by_arm.values())

    @property
    def seeds(self) -> int:
        """The most seeds of compared runs that an arm has."""
        arms = [run.arm for run in self.compared]
        return max((arms.count(arm) for arm in set(arms)), default=0)

    @property
    def results(self) -> tuple[ArmResult, ...]:
        """The results of `first_seed`."""
        return tuple(run.result for run in self.first_seed)


def _best_trial(runs: Sequence[FinishedRun]) -> Trial:
    losses: dict[Trial, list[float]] = {}
    for run in runs:
        losses.setdefault(run.trial, []).append(run.result.validation_loss)
    return min(losses, key=lambda trial: sum(losses[trial]) / len(losses[trial]))


def read_study(folder: Path) -> StudyRuns:
    """Reads a study's directory and every run in it that has a result; also reads what earlier versions wrote.

    Raises UserError naming the file, and the line if it has lines, if one is missing, unreadable or malformed, and if
    no run has a result.
    """
    found = _read(folder)
    if not found.runs:
        raise UserError(f"{folder} has no finished run: repeat the study's command, which resumes it")
    return found


def read_results(folder: Path) -> StudyRuns:
    """Reads a study's directory as `read_study` does, and the validation losses of runs that have no result.

    Raises UserError as `read_study` does, but only where no run has a validation loss.
    """
    found = _read(folder)
    listed = [run for run in found.listed.runs if run.name in found.unfinished]
    begun = [run for run in (_read_begun(folder, run) for run in listed) if run.validation_losses]
    if not found.runs and not begun:
        raise UserError(f"{folder} has no validation loss of any run: run the study first")
    return dataclasses.replace(found, begun=tuple(begun))


def _read(folder: Path) -> StudyRuns:
    path = folder / StudyFiles.STUDY
    if not path.exists() and (folder / StudyFiles.EARLIER).exists():
        path = folder / StudyFiles.EARLIER
        study, listed = _read_earlier(path)
    else:
        study, listed = _read_versioned(path), _read_list(folder / StudyFiles.RUNS)
    # A search lists the runs at each rate for all arms, so that arms with other chosen rates would change places.
    arms = list(dict.fromkeys([*study.get("arms", ()), *(run.arm for run in listed.runs)]))
    in_order = sorted(listed.runs, key=lambda run: arms.index(run.arm))
    done = [run for run in in_order if (folder / run.folder / RunFiles.RESULT).exists()]
    runs = tuple(_read_finished(folder, run) for run in done)
    return StudyRuns(study=study, parity=_read_parity(study, path), listed=listed, runs=runs)


def _read_parity(study: Mapping[str, Any], path: Path) -> tuple[Parity, ...]:
    from pydantic import TypeAdapter

    claims = json.dumps(study.get("parity", [{}]))
    return _parse(TypeAdapter(tuple[Parity, ...]), claims, path, " parity")


def _read_list(path: Path) -> RunList:
    from pydantic import TypeAdapter

    found = _read_versioned(path)
    found.pop("schema_version", None)
    return _parse(TypeAdapter(RunList), json.dumps(found), path)


def _read_earlier(path: Path) -> tuple[dict[str, Any], RunList]:
    """Reads what a version before studies wrote: each arm was one run, in the folder of its name."""
    experiment = _read_versioned(path)
    arms = experiment.pop("arms", None)
    if not isinstance(arms, dict) or not arms:
        raise UserError(f'{path}: has no "arms"; run the study again in a fresh directory')
    runs = [
        ListedRun(
            name=plain_name(name, f"{path}: arms"),
            arm=name,
            seed=0,
            identity="",
            folder=name,
            labels={"arm": name, "seed": 0, "learning_rate": arm.get("learning_rate", 0.0)},
            compared=True,
        )
        for name, arm in arms.items()
    ]
    study = {**experiment, "parity": [{"apart": experiment.pop("varies", [])}]}
    return study, RunList(runs=tuple(runs), complete=True)


def _read_finished(folder: Path, listed: ListedRun) -> FinishedRun:
    from pydantic import TypeAdapter

    run_dir = folder / listed.folder
    result = run_dir / RunFiles.RESULT
    return FinishedRun(
        listed=listed,
        result=_parse(TypeAdapter(ArmResult), _read_text(result), result),
        config=_read_versioned(run_dir / RunFiles.CONFIG),
        environment=_read_object(run_dir / RunFiles.ENVIRONMENT),
        metrics=_read_lines(MetricsRow, run_dir / RunFiles.METRICS),
        timings=_read_lines(TimingRow, run_dir / RunFiles.TIMINGS),
        samples=_read_lines(ScoredSample, run_dir / RunFiles.SAMPLES),
    )


def _read_begun(folder: Path, listed: ListedRun) -> BegunRun:
    from pydantic import TypeAdapter

    path, adapter = folder / listed.folder / RunFiles.METRICS, TypeAdapter(MetricsRow)
    validated = [row for row in read_rows(path) if row.get("validation_loss") is not None]
    rows = [_parse(adapter, json.dumps(row), path) for row in validated]
    return BegunRun(
        listed=listed,
        validation_losses={row.step: row.validation_loss for row in rows if row.validation_loss is not None},
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the run is not finished; repeat its command, which resumes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); {_remedy(path)}") from None


def _remedy(path: Path) -> str:
    what = "it" if path.name in (StudyFiles.STUDY, StudyFiles.RUNS, StudyFiles.EARLIER) else f"the folder {path.parent}"
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
