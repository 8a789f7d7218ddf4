"""`twinstack status`: how far the runs of studies are, whoever trains them."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.config import from_earlier_json
from common.errors import UserError, nearest
from common.files import read_object
from common.paths import user_path
from common.report.units import duration
from common.terminal import marked_up
from common.train.run_files import StudyFiles
from experiments.cli.arguments import RUNS
from experiments.members import Member
from experiments.running.study_folder import Standing, StudyFolder, last_timing
from experiments.study import Study


def status(*, source: str | None) -> None:
    """Prints a line for each study under `runs/`, or a row for each run of one study."""
    console = Console()
    if source is None:
        for path in sorted(RUNS.glob(f"*/{StudyFiles.STUDY}")):
            console.print(marked_up(f"{path.parent}: {_summary(open_folder(path.parent))}"), soft_wrap=True)
        return
    folder = open_folder(study_path(source))
    console.print(_table(folder))
    console.print(marked_up(_summary(folder)))


def study_path(source: str) -> Path:
    """Returns the directory of a study, by its path or its name under `runs/`. Raises UserError if there is none."""
    for path in (user_path(source), RUNS / Path(source).stem):
        if (path / StudyFiles.STUDY).is_file() or (path / StudyFiles.EARLIER).is_file():
            return path
    known = [path.parent.name for path in RUNS.glob(f"*/{StudyFiles.STUDY}")]
    raise UserError(f"{source!r} is no study's directory, nor is {RUNS / Path(source).stem}: {nearest(source, known)}")


def open_folder(path: Path) -> StudyFolder:
    """Opens a study's directory by the config that it holds."""
    if not (path / StudyFiles.STUDY).is_file():
        raise UserError(f"{path} was written before there were studies: only `twinstack report` reads it")
    stored = read_object(path / StudyFiles.STUDY)
    stored.pop("schema_version", None)
    return StudyFolder(path, from_earlier_json(Study, stored))


def _table(folder: StudyFolder) -> Table:
    table = Table(title=marked_up(folder.study.name))
    for name in ("run", "state", "step", "validation loss", ""):
        table.add_column(name, justify="right" if name in ("step", "validation loss") else "left")
    for member in folder.members().members:
        standing = folder.standing(member)
        loss = "" if standing.loss is None else f"{standing.loss:.4f}"
        step = f"{standing.step:,} of {member.run.steps:,}"
        left = _left(folder, member, standing)
        table.add_row(marked_up(member.name), standing.state, step, loss, marked_up(standing.why or left))
    return table


def _summary(folder: StudyFolder) -> str:
    members = folder.members()
    states = Counter(folder.standing(member).state for member in members.members)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    more = "" if members.complete else "; more runs follow from these"
    return f"{len(members.members)} runs: {counts}{more}"


def _left(folder: StudyFolder, member: Member, standing: Standing) -> str:
    """Returns the time left of a run that is being trained, at its mean pace so far."""
    if standing.state != "running" or not standing.step:
        return ""
    seconds = float(last_timing(folder.run_dir(member)).get("seconds", 0))
    return f"{duration(seconds / standing.step * (member.run.steps - standing.step))} left" if seconds else ""
