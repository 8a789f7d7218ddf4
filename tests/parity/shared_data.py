"""Real data that is not in the repository."""

import os
from pathlib import Path

import pytest

HERE = Path(os.environ.get("TWINSTACK_SHARED_DATA") or Path(__file__).parents[2] / "../shared/data")


def shared_file(name: str) -> Path:
    """A file of the shared data; skips the test if it is absent."""
    path = HERE / name
    if not path.is_file():
        pytest.skip(f"{path} is absent: set TWINSTACK_SHARED_DATA")
    return path
