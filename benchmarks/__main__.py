"""Runs `python -m benchmarks`; see `benchmarks.run`."""

import sys

from experiments.cli.main import skip_tpu_search

if __name__ == "__main__":
    skip_tpu_search()
    from benchmarks.run import main

    sys.exit(main())
