"""The options of `twinstack run` for training on other machines."""

import argparse

from common.ranges import Range
from experiments.cli.options import whole


def add_elsewhere(run: argparse.ArgumentParser) -> None:
    """Adds `--on` and what its engines need."""
    run.add_argument(
        "--on",
        metavar="ENGINE",
        help="train on other machines: ray (the cluster at $RAY_ADDRESS, else one on this machine) or sky (SkyPilot)",
    )
    run.add_argument("--topology", metavar="TPU", help="with --on sky: the slice of each job, such as v6e-4")
    run.add_argument(
        "--cpus",
        action=whole(Range(1, 1024, unit="cores")),
        metavar="N",
        help="with --on sky: instead of a slice, a machine of N cores, which trains N runs at a time",
    )
    run.add_argument("--bucket", metavar="GS_URL", help="with --on sky: gs://BUCKET[/FOLDER], where results meet")
    run.add_argument("--spot", action="store_true", help="with --on sky: use preemptible capacity")
    run.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="with --on sky: an environment variable for the hosts; no secrets: files hold it",
    )
    run.add_argument(
        "--bundle",
        action=whole(Range(1, 10_000, unit="runs")),
        default=1,
        metavar="N",
        help="with --on sky: runs per job, one after another (1)",
    )
    run.add_argument(
        "--go", action="store_true", help="with --on sky: submit the jobs; without it only files are written"
    )
