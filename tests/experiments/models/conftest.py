"""A small run and a model folder with the same parameters."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.config import to_json
from common.data.config import SentencePieceConfig
from common.data.tokenizers.sentence_piece import train_model
from common.train.config import Budget
from common.train.loop import Fitted
from common.train.run_files import StudyFiles
from common.weights.folder import write_folder
from experiments.study import Study
from tests.experiments.tiny_study import WORDS, tiny_study, train_run, with_train, write_data
from tests.tiny import Observer


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    budget = Budget(unit="steps", amount=4)
    return tiny_study(folder).edited(lambda run: with_train(run, budget=budget, checkpoint_every=2))


@pytest.fixture(scope="session")
def run_dir(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Fitted]:
    """Trains the arm `gpt` of the study; the other arm has not begun."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    fitted = train_run(study.arms["gpt"], "gpt", path / "gpt", Observer())
    (path / StudyFiles.STUDY).write_text("{}")
    return path, fitted


@pytest.fixture(scope="session")
def model_folder(study: Study, tmp_path_factory: pytest.TempPathFactory, run_dir: Any) -> Path:
    """Makes a model folder with the same parameters in bfloat16, and a SentencePiece model."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    text = {
        "tokenizer": {"kind": "sentencepiece", "file": "source/spiece.model", "sentinels": 3, "add_bos": True},
        "alignment": "native",
        "start_id": 0,
        "eos_ids": [1, 7],
        "bos_id": 2,
    }
    with write_folder(path) as writer:
        writer.manifest(model=to_json(study.arms["gpt"].model), text=text, source={})
        (writer.path / "source").mkdir()
        lines = [" ".join(WORDS)] * 20
        config = SentencePieceConfig(vocab_size=28, byte_fallback=False, character_coverage=1.0)
        (writer.path / "source" / "spiece.model").write_bytes(train_model(lines, config))
        params = jax.tree.map(lambda x: np.asarray(x.astype(jnp.bfloat16)), run_dir[1].params)
        writer.write_tree(params, stacked=("layers",))
    return path
