"""`twinstack report`: writes the report of a run directory again."""

from pathlib import Path

from common.errors import UserError, nearest
from common.terminal import harmless
from common.train.run_files import ExperimentFiles
from experiments.cli.arguments import RUNS
from experiments.running import comparison


def report(*, source: Path, figure: Path | None) -> None:
    run_dir = next((path for path in (source, RUNS / source) if _is_run(path)), None)
    if run_dir is None:
        runs = [path.name for path in RUNS.glob("*") if _is_run(path)]
        raise UserError(f"{str(source)!r} is no run directory, nor is {RUNS / source}: {nearest(str(source), runs)}")
    print(harmless(str(comparison.report(run_dir, figure))))


def _is_run(path: Path) -> bool:
    return (path / ExperimentFiles.EXPERIMENT).is_file()
