"""`twinstack run STUDY --on sky`: the missing runs of a study as managed jobs of SkyPilot."""

import os
from collections.abc import Sequence

from rich.console import Console

from common.errors import UserError
from common.paths import check_folder
from experiments.cli.arguments import RUNS
from experiments.cli.chosen import Chosen
from experiments.launching import source
from experiments.launching.bundles import submit_missing
from experiments.launching.job import Bucket, Job, run_name, variables
from experiments.launching.readable import check_readable
from experiments.launching.slices import rentable
from experiments.running.study_folder import StudyFolder


def on_sky(
    name: str,
    chosen: Chosen,
    results: StudyFolder,
    topology: str | None,
    cpus: int | None,
    bucket: str | None,
    *,
    spot: bool,
    env: Sequence[str],
    bundle: int,
    go: bool,
) -> int:
    """Writes the jobs and, with `go`, submits them; returns the exit status: 1 if a run failed."""
    if bucket is None or (topology is None) == (cpus is None):
        raise UserError("--on sky needs --bucket gs://BUCKET, and --topology, such as v6e-4, or --cpus, such as 8")
    job = Job(
        run=run_name(name),
        study=name,
        overrides=chosen.overrides,
        topology=None if topology is None else rentable(topology, 1),
        cpus=cpus,
        bucket=Bucket.of(bucket),
        zone=None,
        spot=spot,
        commit=source.committed(),
        variables=variables(env, os.environ),
    )
    study = chosen.selected
    study.check()
    check_readable(study, job)
    folder = RUNS / "launch" / job.run
    check_folder(folder, "the jobs' folder")
    return submit_missing(job, study, results, folder, Console(), bundle=bundle, go=go)
