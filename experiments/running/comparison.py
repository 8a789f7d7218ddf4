"""What the commands do. The command line parses, these work."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.logging import RichHandler
from rich.panel import Panel

from common.config import Change, to_json
from common.data.cache import default_cache_dir
from common.errors import UserError
from common.files import write_json
from common.paths import check_file
from common.report.results import ArmResult
from common.sharding.hosts import is_first, on_first_process
from common.terminal import marked_up
from common.train import run_dir as rd
from common.train.programs import check_rows, make_programs
from common.train.run_files import ExperimentFiles, RunFiles
from experiments.config import Experiment
from experiments.models.initial import check_initial, check_tokenizers
from experiments.running.console import Harmless, ProgressBars
from experiments.running.pipeline import (
    Data,
    finished,
    make_setup,
    open_data,
    score_arm,
    train_arm,
)
from experiments.running.scored_splits import ScoredSplit, open_tests


def train(experiment: Experiment, arm: str, run_dir: Path, *, profile_steps: int = 0) -> None:
    """Trains one arm to the end, from its newest checkpoint where there is one, and scores it.

    `profile_steps` of this launch's steps are traced into the arm's directory.
    """
    console = _begin(experiment, run_dir, [arm])
    data, tests = _data(experiment, run_dir, [arm], console)
    _claim(experiment, run_dir)
    result = _train_and_score(experiment, arm, data, tests, run_dir, console, profile_steps)
    _show([result], console)
    console.print(marked_up(f"{arm}: validation loss {result.validation_loss:.4f}; results in {run_dir / arm}"))


def compare(experiment: Experiment, run_dir: Path, *, profile_steps: int = 0) -> None:
    """Trains all arms, as `train` does, prints them side by side and writes the report."""
    from common.report.certificate import certify_run
    from common.report.run_files import read_run
    from common.report.tables import certificate_panel

    arms = list(experiment.arms)
    console = _begin(experiment, run_dir, arms)
    card = f"{marked_up(experiment.question)}\n\n[dim]{marked_up(experiment.expected)}[/dim]"
    console.print(Panel(card, title=marked_up(experiment.name)))
    data, tests = _data(experiment, run_dir, arms, console)
    _claim(experiment, run_dir)
    for name in arms:
        _train_and_score(experiment, name, data, tests, run_dir, console, profile_steps)

    def conclude() -> None:
        run = read_run(run_dir)
        _show(run.results, console)
        console.print(certificate_panel(certify_run(run)))
        console.print(marked_up(f"report: {report(run_dir)}"))

    on_first_process(conclude)


def _show(results: Sequence[ArmResult], console: Console) -> None:
    from common.report.tables import comparison_table, groups_table

    console.print(comparison_table(results))
    if any(result.scores for result in results):
        console.print(groups_table(results))


def report(run_dir: Path, figure: Path | None = None) -> Path:
    """Writes `report.html` from what the run directory holds, and the drawing of its arms where one is asked for.

    Says, on standard error, which arms have no result.
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


def check_devices(experiment: Experiment, arms: Iterable[str]) -> None:
    """Raises UserError where the mesh asks for more devices than there are, or does not divide rows or parameters."""
    for name in arms:
        setup = make_setup(experiment, experiment.arms[name])
        make_programs(setup)
        check_rows(setup)


def _begin(experiment: Experiment, run_dir: Path, arms: Sequence[str]) -> Console:
    prepare_jax()
    experiment.check_arms(arms)
    check_devices(experiment, arms)
    path = run_dir / ExperimentFiles.EXPERIMENT

    def check_directory() -> None:
        begun = any(rd.has_begun(config.parent) for config in run_dir.glob(f"*/{RunFiles.CONFIG}"))
        if not (begun and path.exists()):
            return
        changes = rd.identity_changes(rd.read_described(path), rd.described(to_json(experiment)))
        if changes := [change for change in changes if not _only_scores(change)]:
            raise UserError(
                f"{run_dir} holds another config of {experiment.name} ({'; '.join(map(str, changes))}): "
                "choose another --run-dir, or remove it"
            )

    on_first_process(check_directory)
    console = Console(quiet=not is_first())
    seeds = f"train.seed {experiment.train.seed} decides the first weights and dropout, "
    seeds += f"data.seed {experiment.data.seed} the order and packing of the data"
    console.print(seeds, soft_wrap=True)
    remarks = [f"warning: {remark}" for remark in experiment.remarks()]
    for line in [*remarks, *check_initial(experiment, run_dir, arms)]:
        console.print(marked_up(line))
    return console


def _only_scores(change: Change) -> bool:
    """Whether a change of a config touches what finished models are scored on, and nothing that trains them."""
    return change.path.startswith("evaluation.") and not change.path.startswith("evaluation.validation_batches")


def prepare_jax() -> None:
    """Compiled programs are kept in `$JAX_COMPILATION_CACHE_DIR` or on disk, so that a resumed run starts at once."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default_cache_dir() / "xla")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    handler = RichHandler(show_path=False)
    handler.setFormatter(Harmless("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("absl", "asyncio"):  # Orbax prints the stacks of failures that it raises as well
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _data(
    experiment: Experiment, run_dir: Path, arms: Sequence[str], console: Console
) -> tuple[Data, dict[str, ScoredSplit]]:
    """What is trained on and what is scored: a wrong split is reported before training, not after it."""
    data = open_data(experiment, arms)
    for line in check_tokenizers(experiment, data.tokenizer, run_dir, arms):
        console.print(marked_up(line))
    tests = open_tests(experiment, data.tokenizer)
    for name, test in tests.items():
        console.print(marked_up(test.in_training.sentence(name)), soft_wrap=True)
    return data, tests


def _claim(experiment: Experiment, run_dir: Path) -> None:
    """Makes the directory the experiment's: from here on what is wrong would show in training alone."""
    on_first_process(lambda: write_json(run_dir / ExperimentFiles.EXPERIMENT, rd.described(to_json(experiment))))


def _train_and_score(
    experiment: Experiment,
    name: str,
    data: Data,
    tests: dict[str, ScoredSplit],
    run_dir: Path,
    console: Console,
    profile_steps: int,
) -> ArmResult:
    if (result := finished(experiment, name, data, run_dir)) is not None:
        console.print(f"{marked_up(name)}: trained and scored already, step {result.steps}", soft_wrap=True)
        return result
    progress = ProgressBars(console)
    progress.say(f"{name}: compiling")
    with progress.training(name) as bar:
        fitted = train_arm(experiment, name, data, run_dir, bar, profile_steps)
    return score_arm(experiment, name, data, tests, fitted, run_dir, progress)
