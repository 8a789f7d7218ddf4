"""An experiment that takes seconds, on local files. As a program, trains one arm: FOLDER ARM RUN_DIR [RUN_DIR ...]."""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from common.data.config import DataConfig, SentencePieceConfig
from common.data.objectives.config import Supervised
from common.data.sources.config import SourceConfig
from common.train.config import Budget
from experiments.config import Arm, Evaluation, Experiment
from experiments.running.pipeline import open_data, train_arm
from tests.tiny import tiny, train_config

STEPS, CHECKPOINT_EVERY = 40, 5
WORDS = "no one two three four five six seven eight nine ten and plus minus times".split()


def write_data(folder: Path) -> None:
    """Writes sums in words, as JSON lines."""
    dice = random.Random(0)
    for split, records in (("train", 300), ("validation", 40)):
        lines = []
        for _ in range(records):
            words = dice.choices(WORDS, k=dice.randint(1, 4))
            lines.append(json.dumps({"en": " ".join(words), "reversed": " ".join(reversed(words))}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def tiny_experiment(folder: Path) -> Experiment:
    """Returns the experiment on the files that `write_data` wrote."""
    return Experiment(
        name="tiny",
        question="Who reverses words?",
        expected="Nobody, so soon.",
        data=DataConfig(
            source=SourceConfig(name=f"jsonl:{folder}/{{split}}.jsonl", inputs="en", targets="reversed"),
            tokenizer=SentencePieceConfig(vocab_size=36, byte_fallback=False, character_coverage=1.0),
            objective=Supervised(),
            rows=4,
            input_length=24,
            target_length=24,
        ),
        train=train_config(
            budget=Budget(unit="steps", amount=STEPS), validate_every=10, checkpoint_every=CHECKPOINT_EVERY
        ),
        evaluation=Evaluation(splits=("validation",), examples=8, rows=8, max_new_tokens=4, validation_batches=2),
        arms={name: Arm(model=tiny(name), learning_rate=1e-2) for name in ("gpt", "t5like")},
    )


class Slow:
    """Prints when training begins, and slows it down so that it can be killed."""

    def note(self, message: str) -> None:
        print(message, flush=True)

    def begin(self, step: int, steps: int) -> None:
        print("begin", flush=True)

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        time.sleep(0.02)


def main(folder: Path, arm: str, *run_dirs: Path) -> None:
    experiment = tiny_experiment(folder)
    data = open_data(experiment)
    for run_dir in run_dirs:
        train_arm(experiment, arm, data, run_dir, Slow())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
