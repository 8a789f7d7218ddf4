"""`twinstack compare`: trains and scores all arms, and writes the report."""

from collections.abc import Sequence
from pathlib import Path

from common.train.distributed import joined
from experiments.cli.chosen import choose, print_resolved, run_directory
from experiments.running import comparison


def compare(
    *,
    name: str,
    overrides: Sequence[str],
    print_config: bool,
    match: str | None,
    init_from: str | None,
    run_dir: Path | None,
    profile: int,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> None:
    experiment = choose(name, overrides, match=match, init_from=init_from).experiment
    if print_config:
        print_resolved(experiment)
        return
    results = run_directory(name, run_dir)
    with joined(coordinator, processes, process):
        comparison.compare(experiment, results, profile_steps=profile)
