"""Runs a study in this process: plan, train what is missing, conclude with tables and the report."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from common.paths import check_file
from common.report.run_files import StudyRuns
from common.sharding.hosts import is_first, on_first_process
from common.terminal import marked_up
from common.train.run_files import StudyFiles
from experiments.running.execute import Outcome, StudyWorker
from experiments.running.jax_setup import set_up_jax
from experiments.running.study_folder import StudyFolder


def run_study(folder: StudyFolder, arms: Sequence[str], *, profile_steps: int = 0) -> int:
    """Trains and scores what is missing of these arms, prints the results and writes the report.

    Returns the exit status: 1 if a run failed. `profile_steps` steps of each run's launch are traced into its
    directory.
    """
    set_up_jax()
    console = Console(quiet=not is_first())
    study = folder.study
    worker = StudyWorker(folder, console, arms=arms, profile_steps=profile_steps)
    worker.check()
    card = f"{marked_up(study.question)}\n\n[dim]{marked_up(study.expected)}[/dim]"
    console.print(Panel(card, title=marked_up(study.name)))
    outcome = worker.work()
    return on_first_process(lambda: conclude(folder, outcome, console))


def conclude(folder: StudyFolder, outcome: Outcome, console: Console) -> int:
    """Prints the results so far, writes the report, says what failed or is left, and returns the exit status."""
    from common.report.certificate import certify
    from common.report.run_files import read_study
    from common.report.tables import certificate_panel

    folder.write_list(folder.members())
    if any(folder.standing(member).state == "done" for member in folder.members().members):
        runs = read_study(folder.path)
        _show(runs, console)
        console.print(certificate_panel(certify(runs)))
        console.print(marked_up(f"report: {write_reports(folder.path)}"), soft_wrap=True)
    if outcome.waiting:
        console.print(marked_up(f"left: {', '.join(outcome.waiting)}"), soft_wrap=True)
    for name, why in outcome.failed.items():
        console.print(marked_up(f"{name} FAILED: {why}"), soft_wrap=True)
    if outcome.failed:
        console.print("the same command tries failed runs again; a run that diverged is kept as it is")
    return 1 if outcome.failed else 0


def write_reports(folder: Path, figure: Path | None = None) -> Path:
    """Writes `report.html` from the results in a study's directory, and a figure of all arms to `figure`.

    Lists the runs without a result on standard error.
    """
    from common.report.html import write_figure, write_report
    from common.report.run_files import read_study

    check_file(folder / StudyFiles.REPORT, "the report")
    if figure is not None:
        check_file(figure, "--figure")
    if lacking := read_study(folder).unfinished:
        shown = ", ".join(map(marked_up, lacking[:8])) + (f" and {len(lacking) - 8} more" if len(lacking) > 8 else "")
        Console(stderr=True).print(f"without {shown}, not trained and scored yet: `twinstack run` for all")
    if figure is not None:
        write_figure(folder, figure)
    return write_report(folder)


def _show(runs: StudyRuns, console: Console) -> None:
    from common.report.findings import find
    from common.report.study_page import arms_table, is_large
    from common.report.tables import comparison_table, groups_table

    if is_large(runs):
        console.print(arms_table(runs))
        for finding in find(runs).found:
            console.print(marked_up(finding.sentence), soft_wrap=True)
        return
    results = [run.result for run in runs.compared]
    console.print(comparison_table(results))
    if any(result.scores for result in results):
        console.print(groups_table(results))
