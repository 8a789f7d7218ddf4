"""How many small models `twinstack run` trains, validates and scores in an hour on this machine.

As a study file (`twinstack run benchmarks/many_runs.py`), it is the study that is timed: one arm a size, the same model
with several seeds.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.decoder import cores
from common.data.config import SentencePieceConfig
from common.recipe import Recipe
from common.train.config import Budget, Linear
from experiments.families import GPT
from experiments.first_light import first_light
from experiments.run import Evaluation
from experiments.study import Study

STUDY = Path(__file__)
STEPS, VOCABULARY = 500, 512
SIZES = {"16": (16, 16), "64": (64, 112)}
"""Arm -> width and d_ff of a decoder of two layers."""
SEEDS = {"16": 24, "64": 8}
"""Runs of each arm that are timed together; start-up and compiling are paid once for all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyRuns:
    """What it took to train, validate and score `runs` models."""

    parameters: int
    runs: int
    seconds: float

    @property
    def per_hour(self) -> float:
        return 3600 * self.runs / self.seconds


def study() -> Study:
    base = first_light().arms["gpt"]
    recipe = Recipe(positions="rope", mlp="swiglu", init="fan_in", tied_embeddings=True)
    text = SentencePieceConfig(vocab_size=VOCABULARY, byte_fallback=False, character_coverage=1.0)
    run = dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, tokenizer=text),
        train=dataclasses.replace(
            base.train,
            budget=Budget(unit="steps", amount=STEPS),
            schedule=Linear(warmup_steps=50),
            validate_every=STEPS,
            checkpoint_every=STEPS,
        ),
        evaluation=Evaluation(splits=("test",), examples=125, rows=125, max_new_tokens=64, validation_batches=8),
    )
    arms = {
        arm: dataclasses.replace(
            run,
            model=GPT.sized(width=width, layers=2, heads=2, d_ff=d_ff, vocab_size=VOCABULARY, recipe=recipe),
            labels={"width": width},
        )
        for arm, (width, d_ff) in SIZES.items()
    }
    return Study(name="many_runs", question="How many models an hour?", arms=arms, parity=())


def measure(arm: str, advance: Callable[[int], None]) -> ManyRuns:
    """Times the command for one arm, from its start to its report, with a worker a core and no compiled programs kept
    from before; the data and their tokenizer are built first, as they are once a machine."""
    command = [sys.executable, "-m", "experiments.cli"]
    subprocess.run([*command, "data", "show", str(STUDY), "--rows", "1"], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        options = [f"arm={arm}", f"seeds={SEEDS[arm]}", "--jobs", str(cores()), "--run-dir", f"{folder}/study"]
        start = time.perf_counter()
        subprocess.run(
            [*command, "run", str(STUDY), *options],
            check=True,
            env={**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/xla"},
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
    advance(1)
    return ManyRuns(parameters=study().arms[arm].model.param_count(), runs=SEEDS[arm], seconds=seconds)
