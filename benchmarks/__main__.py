"""Runs `python -m benchmarks`; see `benchmarks.run`."""

import sys

from experiments.cli.main import tell_jax_where_no_tpu_is

if __name__ == "__main__":
    tell_jax_where_no_tpu_is()
    from benchmarks.run import main

    sys.exit(main())
