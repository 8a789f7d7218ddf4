"""Runs `python -m benchmarks`; see `benchmarks.run`."""

import sys

from experiments.cli.main import keep_memory_on_cpu, skip_tpu_search

if __name__ == "__main__":
    skip_tpu_search()
    keep_memory_on_cpu()
    from benchmarks.run import main

    sys.exit(main())
