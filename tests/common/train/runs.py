"""Helpers of the tests that train: a whole run to compare with, and comparisons to the bit."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from common.train.loop import Fitted
from common.train.run_files import RunFiles
from common.train.task import Task
from tests.tiny import Observer

STEPS = 8
families = pytest.mark.parametrize("family", ["gpt", "t5like"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unbroken:
    """A run that went to the end without interruption."""

    task: Task
    folder: Path
    fitted: Fitted
    observer: Observer

    def metrics(self) -> bytes:
        return (self.folder / RunFiles.METRICS).read_bytes()


def same_bits(found: Any, expected: Any) -> None:
    """Asserts that two trees have equal arrays, to the bit."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved_steps(folder: Path) -> set[int]:
    """Returns the steps of the checkpoints in a run directory."""
    return {int(path.name) for path in (folder / RunFiles.CHECKPOINTS).iterdir() if path.name.isdigit()}
