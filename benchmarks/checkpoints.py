"""What saving costs a run: the time in which it holds training up, and by how much it slows the steps beside it."""

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
from experiments.families import builder
from gpt.config import GptConfig

MODEL = GptConfig(
    vocab_size=8192,
    num_layers=4,
    d_model=512,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    d_ff=1408,
    recipe=Recipe(positions="rope", mlp="swiglu", init="fan_in"),
)
ROWS, LENGTH = 4, 128
PERIOD_SECONDS = 100.0
"""Of training to a save, such as 100 steps of a second: what is measured is told as a share of it."""
BETWEEN = 4
"""Steps that are looked at before and after a save; writing it takes less time than they do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saves:
    """Of one run, in seconds a save."""

    parameters: int
    state_bytes: int
    step: Spread
    """Of steps beside which nothing is written."""
    blocking: Spread
    """Until training went on, the arrays copied and their checksums taken."""
    slowdown: Spread
    """What `BETWEEN` steps after a save took beyond as many quiet ones: about 0 where writing is free."""
    share: Spread
    """Both together, of `PERIOD_SECONDS`."""


class _Stream:
    """One batch again and again."""

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
            examples=ROWS,
            length_sums=LengthSums.of_rows(ROWS, 0, LENGTH),
            loss_tokens=ROWS * LENGTH,
        )

    def iterate(self, start: int, stop: int) -> Iterator[HostBatch]:
        return itertools.repeat(self.host, stop - start)


class _Watcher:
    def __init__(self, advance: Callable[[int], None]):
        self.advance = advance

    def note(self, message: str) -> None:
        raise AssertionError(message)

    def begin(self, step: int, steps: int) -> None:
        pass

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        self.advance(1)


def measured_steps(saves: int) -> int:
    return (2 * saves + 1) * BETWEEN


def measure(saves: int, advance: Callable[[int], None]) -> Saves:
    """Trains by the loop itself, with `saves` saves and one more at the end, which is not counted."""
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
    """Steps 2kB + 1 to 2kB + B come after a save, the B before them have nothing beside them (B: `BETWEEN`)."""
    seconds = np.array([row["step_seconds"] for row in rows])
    held = np.diff([row["checkpoint_seconds"] for row in rows])
    blocking, slowdown, shares = [], [], []
    for save in range(2 * BETWEEN, 2 * BETWEEN * saves + 1, 2 * BETWEEN):
        quiet = np.median(seconds[save - BETWEEN : save])
        blocking.append(float(held[save - 1]))
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
