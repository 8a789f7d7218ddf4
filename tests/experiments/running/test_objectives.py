"""Every objective from the command line: train both families, score, report, convert, generate."""

import json
import random
import typing
from pathlib import Path

import pytest

from common.data.objectives.config import Objective
from common.files import read_rows
from common.report.certificate import certify
from common.report.run_files import read_study
from experiments.cli.main import main
from tests.experiments.tiny_study import WORDS

KINDS = [member.kind for member in typing.get_args(Objective)]
SLOTS = {
    "causal_lm": (0, 64),
    "full_lm": (0, 64),
}
"""Input and target slots of a row."""
USUAL_SLOTS = (64, 72)
EXTRA = {
    "supervised": [
        *("data.source.text=null", "data.source.inputs=text", "data.source.targets=text"),
        *('evaluation.splits=["validation"]', "evaluation.examples=2", "evaluation.rows=2"),
    ],
    "mixture": ['data.objective.parts=[{"objective": {"kind": "full_lm"}}, {"objective": {"kind": "prefix_lm"}}]'],
}
STEPS = 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, dice = tmp_path_factory.mktemp("texts"), random.Random(0)
    for split, records in (("train", 100), ("validation", 20)):
        lines = (json.dumps({"text": " ".join(dice.choices(WORDS, k=8))}) for _ in range(records))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def overrides(texts: Path, kind: str) -> list[str]:
    """Returns overrides of the study `pydocs`: tiny models and two steps on two short rows."""
    sizes = {"vocab_size": 128, "d_model": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "d_ff": 16}
    layers = {"gpt": ["num_layers"], "t5like": ["encoder_layers", "decoder_layers"]}
    inputs, targets = SLOTS.get(kind, USUAL_SLOTS)
    return [
        *(f"data.source.name=jsonl:{texts}/{{split}}.jsonl", f"data.objective.kind={kind}", *EXTRA.get(kind, ())),
        *("data.tokenizer.vocab_size=72", "data.tokenizer.sentinels=40", "data.tokenizer.byte_fallback=false"),
        *("data.tokenizer.character_coverage=1", "data.rows=2"),
        *(f"data.input_length={inputs}", f"data.target_length={targets}"),
        *(f"train.budget.amount={STEPS}", "train.schedule.warmup_steps=1", "evaluation.validation_batches=1"),
        *(f"arms.{arm}.model.{name}={size}" for arm in layers for name, size in sizes.items()),
        *(f"arms.{arm}.model.{name}=1" for arm, names in layers.items() for name in names),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_from_training_to_text(kind: str, texts: Path, tmp_path: Path) -> None:
    def run(*command: object) -> None:
        assert main(list(map(str, command))) == 0

    run_dir, file = tmp_path / "run", tmp_path / "texts.jsonl"
    run("run", "pydocs", "--run-dir", run_dir, *overrides(texts, kind))
    run("report", run_dir)
    found = read_study(run_dir)
    assert all(result.steps == STEPS and result.tokens > 0 for result in found.results)
    assert all((result.input_fill is None) == (kind in SLOTS) for result in found.results)
    (ledger,) = [check for check in certify(found).checks if "XLA" in check.name]
    assert ledger.agrees and "t5like +0.00 %" in ledger.detail and "gpt +0.00 %" in ledger.detail

    records = [{"inputs": "one plus", "targets": "two minus"}, {"text": "three times four"}]
    file.write_text("\n".join(map(json.dumps, records)) + "\n")
    for arm in ("t5like", "gpt"):
        folder, said = tmp_path / f"{arm}-folder", tmp_path / f"{arm}-said.jsonl"
        run("convert", run_dir / arm, folder)
        scores = []
        for model in (run_dir / arm, folder):
            out = tmp_path / f"{model.name}.jsonl"
            run("score", model, "--file", file, "--out", out)
            scores.append([row["log_likelihood"] for row in read_rows(out)])
        assert scores[0] == scores[1] and all(score < 0 for score in scores[0])
        run("generate", folder, "--prompt", "one plus", "--max-new-tokens", 2, "--out", said)
        (row,) = read_rows(said)
        assert row["prompt"] == "one plus"
