"""Trains and scores one arm of an experiment or all of them, and writes the report."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from common.config import to_json
from common.errors import UserError
from common.files import write_json
from common.paths import check_file
from common.progress import ProgressBars
from common.report.results import ArmResult
from common.sharding.hosts import is_first, on_first_process
from common.terminal import marked_up
from common.train import run_dir as rd
from common.train.run_files import ExperimentFiles
from experiments.config import Experiment, complete_run_config
from experiments.models.initial import check_initial, check_tokenizers
from experiments.running.console import training_bar
from experiments.running.jax_setup import set_up_jax
from experiments.running.pipeline import check_devices, open_data, train_arm
from experiments.running.scored_splits import open_tests
from experiments.running.scoring import Opened, finished_result, score_arm


def train(experiment: Experiment, arm: str, run_dir: Path, *, profile_steps: int = 0) -> None:
    """Trains one arm to the end, from its newest checkpoint if there is one, and scores it.

    `profile_steps` steps of this launch are traced into the arm's directory.
    """
    console = _begin(experiment, run_dir, [arm])
    opened = _open(experiment, run_dir, [arm], console)
    _claim(experiment, run_dir)
    result = _train_and_score(opened, arm, console, profile_steps)
    _show([result], console)
    console.print(marked_up(f"{arm}: validation loss {result.validation_loss:.4f}; results in {run_dir / arm}"))


def compare(experiment: Experiment, run_dir: Path, *, profile_steps: int = 0) -> None:
    """Trains and scores all arms, as `train` does, prints them side by side and writes the report."""
    from common.report.certificate import certify_run
    from common.report.run_files import read_run
    from common.report.tables import certificate_panel

    arms = list(experiment.arms)
    console = _begin(experiment, run_dir, arms)
    card = f"{marked_up(experiment.question)}\n\n[dim]{marked_up(experiment.expected)}[/dim]"
    console.print(Panel(card, title=marked_up(experiment.name)))
    opened = _open(experiment, run_dir, arms, console)
    _claim(experiment, run_dir)
    for name in arms:
        _train_and_score(opened, name, console, profile_steps)

    def conclude() -> None:
        run = read_run(run_dir)
        _show(run.results, console)
        console.print(certificate_panel(certify_run(run)))
        console.print(marked_up(f"report: {report(run_dir)}"))

    on_first_process(conclude)


def report(run_dir: Path, figure: Path | None = None) -> Path:
    """Writes `report.html` from the results in the run directory, and a figure of all arms to `figure`.

    Lists the arms without a result on standard error.
    """
    from common.report.html import write_figure, write_report
    from common.report.run_files import read_run

    check_file(run_dir / ExperimentFiles.REPORT, "the report")
    if figure is not None:
        check_file(figure, "--figure")
    if lacking := read_run(run_dir).unfinished:
        how = "the run's command with --arm NAME (`twinstack train`), or `twinstack compare` for all"
        Console(stderr=True).print(f"without {', '.join(map(marked_up, lacking))}, not trained and scored yet: {how}")
    if figure is not None:
        write_figure(run_dir, figure)
    return write_report(run_dir)


def _show(results: Sequence[ArmResult], console: Console) -> None:
    from common.report.tables import comparison_table, groups_table

    console.print(comparison_table(results))
    if any(result.scores for result in results):
        console.print(groups_table(results))


def _begin(experiment: Experiment, run_dir: Path, arms: Sequence[str]) -> Console:
    """Checks everything that can be checked without data, and prints what the user should know."""
    set_up_jax()
    experiment.check_arms(arms)
    check_devices(experiment, arms)
    on_first_process(lambda: _check_directory(experiment, run_dir))
    console = Console(quiet=not is_first())
    seeds = f"train.seed {experiment.train.seed} decides the first weights and dropout, "
    seeds += f"data.seed {experiment.data.seed} the order and packing of the data"
    console.print(seeds, soft_wrap=True)
    remarks = [f"warning: {remark}" for remark in experiment.remarks()]
    for line in [*remarks, *check_initial(experiment, run_dir, arms)]:
        console.print(marked_up(line))
    return console


def _check_directory(experiment: Experiment, run_dir: Path) -> None:
    """Raises UserError where an arm of the directory was trained by another config.

    Prose, evaluations and arms may have been added or changed since: they change no trained model.
    """
    for name in experiment.arms:
        if not rd.has_begun(run_dir / name):
            continue
        before = rd.stored_config(run_dir / name, complete_run_config)
        if changes := rd.identity_changes(before, to_json(experiment.run_config(name))):
            raise UserError(
                f"{run_dir} holds another config of {experiment.name} ({'; '.join(map(str, changes))}): "
                "choose another --run-dir, or remove it"
            )


def _open(experiment: Experiment, run_dir: Path, arms: Sequence[str], console: Console) -> Opened:
    """Opens all data, those of the scored splits too, so that a wrong split is an error before training."""
    data = open_data(experiment, arms)
    for line in check_tokenizers(experiment, data.tokenizer, run_dir, arms):
        console.print(marked_up(line))
    tests = open_tests(experiment, data.tokenizer)
    for name, test in tests.items():
        console.print(marked_up(test.in_training.sentence(name)), soft_wrap=True)
    return Opened(experiment=experiment, run_dir=run_dir, data=data, tests=tests)


def _claim(experiment: Experiment, run_dir: Path) -> None:
    """Records the experiment in the directory, once everything that can fail before training has passed."""
    on_first_process(lambda: write_json(run_dir / ExperimentFiles.EXPERIMENT, rd.described(to_json(experiment))))


def _train_and_score(opened: Opened, name: str, console: Console, profile_steps: int) -> ArmResult:
    if (result := finished_result(opened, name)) is not None:
        console.print(f"{marked_up(name)}: trained and scored already, step {result.steps}", soft_wrap=True)
        about = opened.experiment.arms[name].about
        on_first_process(lambda: rd.refresh(opened.run_dir / name, about, complete_run_config))
        return result
    progress = ProgressBars(console)
    progress.say(f"{name}: compiling")
    with training_bar(console, name) as bar:
        fitted = train_arm(opened.experiment, name, opened.data, opened.run_dir, bar, profile_steps)
    return score_arm(opened, name, fitted, progress)
