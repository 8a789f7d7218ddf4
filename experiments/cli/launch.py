"""`twinstack launch`: writes, and with `--go` submits, a run on Cloud TPU."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from common.errors import UserError, nearest
from common.paths import check_folder
from experiments.cli.arguments import RUNS
from experiments.cli.chosen import choose, print_resolved
from experiments.launching import launch as launching
from experiments.launching import source
from experiments.launching.job import Bucket, Job, run_name, variables
from experiments.launching.readable import check_readable
from experiments.launching.slices import rentable


def launch(
    *,
    name: str,
    overrides: Sequence[str],
    print_config: bool,
    match: str | None,
    topology: str,
    slices: int,
    engine: str,
    zone: str | None,
    spot: bool,
    bucket: str,
    run: str | None,
    env: Sequence[str],
    hours: int | None,
    out: Path | None,
    go: bool,
) -> None:
    chosen = choose(name, overrides, match=match)
    if print_config:
        print_resolved(chosen.study)
        return
    if engine not in launching.ENGINES:
        raise UserError(f"--engine {engine!r}: {nearest(engine, launching.ENGINES)}")
    job = Job(
        run=run_name(name) if run is None else run,
        study=name,
        overrides=chosen.overrides,
        topology=rentable(topology, slices),
        bucket=Bucket.of(bucket),
        zone=zone,
        spot=spot,
        commit=source.committed(),
        variables=variables(env, os.environ),
        hours=hours,
    )
    study = chosen.selected
    study.check()
    check_readable(study, job)
    folder = RUNS / "launch" / job.run if out is None else out
    check_folder(folder, "--out")
    launching.launch(job, study, engine, folder, Console(), go=go)
