"""`twinstack run`: trains and scores whatever is missing of a study, and writes its report."""

import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError, nearest
from experiments.cli.chosen import choose, print_resolved, study_directory
from experiments.running.study_folder import StudyFolder

ENGINES = ("ray", "sky")
"""What can train a study on other machines."""


def run(
    *,
    name: str,
    overrides: Sequence[str],
    print_config: bool,
    config: Path | None,
    match: str | None,
    init_from: str | None,
    run_dir: Path | None,
    jobs: int,
    on: str | None,
    topology: str | None,
    cpus: int | None,
    bucket: str | None,
    spot: bool,
    env: Sequence[str],
    bundle: int,
    go: bool,
    worker: int | None,
    profile: int,
    coordinator: str | None,
    processes: int | None,
    process: int | None,
) -> int:
    """Returns the exit status: 1 if a run failed."""
    chosen = choose(name, overrides, config=config, match=match, init_from=init_from)
    if print_config:
        print_resolved(chosen.study)
        return 0
    folder = StudyFolder(study_directory(name, run_dir), chosen.study, chosen.overrides, chosen.runs)
    if on is not None and (jobs > 1 or profile or coordinator or processes or process):
        raise UserError("--on is without --jobs, --profile, --coordinator, --processes and --process")
    if on == "sky":
        from experiments.cli.on_sky import on_sky

        if config is not None:
            raise UserError("--on sky is without --config: hosts run a study of the commit with overrides")
        return on_sky(name, chosen, folder, topology, cpus, bucket, spot=spot, env=env, bundle=bundle, go=go)
    if topology or cpus or bucket or spot or env or go:
        raise UserError("--topology, --cpus, --bucket, --spot, --env and --go are for --on sky")
    if on is not None:
        if on != "ray":
            raise UserError(f"--on {on!r}: {nearest(on, ENGINES)}")
        from experiments.running.on_ray import run_on_ray

        return run_on_ray(folder, chosen.arms)
    if worker is not None:
        from experiments.running.pool import be_worker

        return be_worker(folder, chosen.arms, number=worker, jobs=jobs, profile_steps=profile)
    if jobs > 1:
        from experiments.running.pool import run_in_pool

        if coordinator or processes or process:
            raise UserError("--jobs is for one machine: without --coordinator, --processes and --process")
        return run_in_pool(folder, chosen.arms, jobs=jobs, command=sys.argv[1:])
    from common.train.distributed import joined
    from experiments.running.study_run import run_study

    with joined(coordinator, processes, process):
        return run_study(folder, chosen.arms, profile_steps=profile)
