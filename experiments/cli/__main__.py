"""`python -m experiments.cli`, for where the script `twinstack` is not installed."""

import sys

from experiments.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
