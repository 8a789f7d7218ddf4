"""What a checkpoint costs: how long it blocks training, and how much it slows the steps while it is written."""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decoder import OPTIMIZER, Spread
from common.compute.length_sums import LengthSums
from common.config import to_json
from common.data.batch import Batch, HostBatch
from common.files import read_rows
from common.recipe import Execution, Recipe
from common.train.config import Budget, Constant, TrainConfig
from common.train.loop import fit
from common.train.programs import Setup
from common.train.run_files import RunFiles
from common.train.task import Task
from experiments.families import GPT, builder

MODEL = GPT.sized(
    width=512, layers=4, d_ff=1408, vocab_size=8192, recipe=Recipe(positions="rope", mlp="swiglu", init="fan_in")
)
ROWS, LENGTH = 4, 128
PERIOD_SECONDS = 100.0
"""Training time per checkpoint, such as 100 steps of a second; results are given as a share of it."""
BETWEEN = 4
"""Steps compared before and after a checkpoint; writing it takes less time than they do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saves:
    """What one run's checkpoints cost; times are in seconds."""

    parameters: int
    state_bytes: int
    step: Spread
    """Time of a step while nothing is written."""
    blocking: Spread
    """Time until training continues: arrays are copied and checksummed."""
    slowdown: Spread
    """How much longer `BETWEEN` steps after a checkpoint take than as many before it; 0 if writing costs nothing."""
    share: Spread
    """`blocking` and `slowdown` together, as a share of `PERIOD_SECONDS`."""


class _Stream:
    """The same batch at every step."""

    content = "random"

    def __init__(self) -> None:
        ids = np.random.default_rng(0).integers(0, MODEL.vocab_size, (ROWS, LENGTH + 1), np.int32)
        ones, none = np.ones((ROWS, LENGTH), np.int32), np.zeros((ROWS, 0), np.int32)
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
        self.host = HostBatch(
            batch=Batch(
                inputs_BI=none,
                input_segments_BI=none,
                input_positions_BI=none,
                decoder_inputs_BT=ids[:, :-1],
                targets_BT=ids[:, 1:],
                target_segments_BT=ones,
                target_positions_BT=positions,
                weights_BT=ones.astype(np.float32),
            ),
            fingerprint=0,
            source_fingerprint=0,
            examples=ROWS,
            length_sums=LengthSums.of_rows(ROWS, 0, LENGTH),
            loss_tokens=ROWS * LENGTH,
        )

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        return itertools.repeat(self.host, stop - start)


class _Watcher:
    """Advances a progress bar; a benchmark's run has nothing to note."""

    def __init__(self, advance: Callable[[int], None]):
        self.advance = advance

    def note(self, message: str) -> None:
        raise AssertionError(message)

    def begin(self, step: int, steps: int) -> None:
        pass

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        self.advance(1)


def measured_steps(saves: int) -> int:
    """How many steps `measure` trains."""
    return (2 * saves + 1) * BETWEEN


def measure(saves: int, advance: Callable[[int], None]) -> Saves:
    """Trains with the training loop and measures `saves` checkpoints; the last one, at the end, is not counted."""
    execution = Execution(dtype="float32", scan_layers=False)
    steps = measured_steps(saves)
    train = TrainConfig(
        budget=Budget(unit="steps", amount=steps),
        optimizer=OPTIMIZER,
        schedule=Constant(),
        validate_every=steps,
        checkpoint_every=2 * BETWEEN,
        execution=execution,
    )
    setup = Setup(
        build=builder(MODEL, execution),
        model=MODEL,
        train=train,
        learning_rate=1e-3,
        steps=steps,
        row_slots=(ROWS, 0, LENGTH),
    )
    stream = _Stream()
    task = Task(
        setup=setup,
        stream=stream,
        validation=(stream.host,),
        config={"model": to_json(MODEL), "train": to_json(train)},
        data={},
    )
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        fit(task, run_dir, _Watcher(advance))
        newest = run_dir / RunFiles.CHECKPOINTS / str(steps)
        state_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        return _saves(read_rows(run_dir / RunFiles.TIMINGS), saves, state_bytes)


def _saves(rows: list[dict[str, Any]], saves: int, state_bytes: int) -> Saves:
    """Compares the `BETWEEN` steps before each checkpoint, while nothing is written, with as many after it.

    With `BETWEEN` = 4, the first checkpoint follows step 8: steps 5 to 8 come before it, 9 to 12 after it.
    """
    seconds = np.array([row["step_seconds"] for row in rows])
    # The total so far, which a row notes before its own step's checkpoint: that of step s enters with row s + 1.
    checkpoint_seconds = np.diff([row["checkpoint_seconds"] for row in rows])
    blocking, slowdown, shares = [], [], []
    for save in range(2 * BETWEEN, 2 * BETWEEN * saves + 1, 2 * BETWEEN):
        quiet = np.median(seconds[save - BETWEEN : save])
        blocking.append(float(checkpoint_seconds[save - 1]))
        slowdown.append(float(seconds[save : save + BETWEEN].sum() - BETWEEN * quiet))
        shares.append((blocking[-1] + slowdown[-1]) / PERIOD_SECONDS)
    return Saves(
        parameters=MODEL.param_count(),
        state_bytes=state_bytes,
        step=Spread.of(seconds[BETWEEN : 2 * BETWEEN].tolist()),
        blocking=Spread.of(blocking),
        slowdown=Spread.of(slowdown),
        share=Spread.of(shares),
    )
