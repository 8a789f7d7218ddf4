"""A run directory of schema 1, kept as it was written in November 2026, stays usable for ever.

Do not write it anew: a version that cannot read it cannot read its users' runs either.
"""

import shutil
from pathlib import Path

import pytest

from common.config import from_json, to_json
from common.files import read_json, read_rows
from common.train import run_dir as rd
from common.train.run_files import RunFiles, StudyFiles
from experiments.cli.main import main
from experiments.run import Run, complete_run, identity

KEPT = Path(__file__).parents[2] / "data/run_schema_1"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "run"))


def test_it_generates_what_it_generated(run_dir: Path, tmp_path: Path) -> None:
    """The training data are gone; tokenizer and parameters come from the directory alone."""
    samples = read_rows(run_dir / "gpt" / RunFiles.SAMPLES)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "texts.jsonl"
    prompts.write_text("".join(f"{sample['inputs']}\n" for sample in samples))
    options = ("--file", prompts, "--out", out, "--max-new-tokens", "4", "--rows", "8")
    assert main(["generate", str(run_dir / "gpt"), *map(str, options)]) == 0
    assert [row["text"] for row in read_rows(out)] == [sample["prediction"] for sample in samples]


def test_it_is_reported(run_dir: Path) -> None:
    result = read_json(run_dir / "gpt" / RunFiles.RESULT)
    assert main(["report", str(run_dir)]) == 0
    assert f"{result['validation_loss']:.4f}" in (run_dir / StudyFiles.REPORT).read_text()


def test_its_experiment_is_still_the_same_run(run_dir: Path) -> None:
    """The hash itself is kept too: a run whose identity changes would be trained again."""
    experiment = rd.read_described(run_dir / StudyFiles.EARLIER)
    shared = {name: experiment[name] for name in ("data", "train", "evaluation")}
    now = from_json(Run, complete_run({**experiment["arms"]["gpt"], **shared}))
    before = rd.stored_config(run_dir / "gpt", complete_run)
    assert rd.identity_changes(before, to_json(now)) == []
    assert identity(now) == identity(from_json(Run, before)) == "dc2e1501542270d5"
