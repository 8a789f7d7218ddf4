"""A study that takes seconds, on local files. As a program, trains one arm: FOLDER ARM STUDY_DIR [STUDY_DIR ...]."""

import dataclasses
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
from common.train.loop import Fitted, fit
from common.train.task import Watcher
from experiments.run import Evaluation, Run
from experiments.running.pipeline import make_task, open_data
from experiments.study import Study
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


def tiny_run(folder: Path, family: str = "gpt") -> Run:
    """Returns an arm of `tiny_study`."""
    return Run(
        model=tiny(family),
        learning_rate=1e-2,
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
        labels={"family": family},
    )


def tiny_study(folder: Path) -> Study:
    """Returns the study on the files that `write_data` wrote."""
    return Study(
        name="tiny",
        question="Who reverses words?",
        expected="Nobody, so soon.",
        arms={family: tiny_run(folder, family) for family in ("gpt", "t5like")},
    )


def with_model(run: Run, **changes: Any) -> Run:
    """Returns the run with other fields of `model`."""
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def with_train(run: Run, **changes: Any) -> Run:
    """Returns the run with other fields of `train`."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


def with_data(run: Run, **changes: Any) -> Run:
    """Returns the run with other fields of `data`."""
    return dataclasses.replace(run, data=dataclasses.replace(run.data, **changes))


def with_evaluation(run: Run, **changes: Any) -> Run:
    """Returns the run with other fields of `evaluation`."""
    return dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, **changes))


def train_run(run: Run, name: str, run_dir: Path, watcher: Watcher) -> Fitted:
    """Trains a run that belongs to no study; does not score it."""
    return fit(make_task(run, open_data(name, run), run.init), run_dir, watcher)


class Slow:
    """Prints when training begins, and slows it down so that it can be killed."""

    def note(self, message: str) -> None:
        print(message, flush=True)

    def begin(self, step: int, steps: int) -> None:
        print("begin", flush=True)

    def step(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        time.sleep(0.02)


def main(folder: Path, arm: str, *study_dirs: Path) -> None:
    for study_dir in study_dirs:
        train_run(tiny_study(folder).arms[arm], arm, study_dir / arm, Slow())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
