"""Makes the directory of a synthetic study of two arms, with texts that break careless reports."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.evals.text_metrics import score_texts
from tests.common.report.studies import STEPS, TOKENS_A_STEP, result_of

KINDS = {"dates": 0.97, "units": 0.95, "currencies": 0.98, "time ranges": 0.9, "territories": 0.985}
Edit = Callable[[dict[str, Any]], None]


def phrases(kind: str, i: int) -> tuple[str, str]:
    month, monat = [("March", "März"), ("May", "Mai"), ("October", "Oktober"), ("July", "Juli")][i % 4]
    return {
        "dates": (
            f"Tuesday, {month} {i % 28 + 1}, {1990 + i % 40}",
            f"Dienstag, {i % 28 + 1}. {monat} {1990 + i % 40}",
        ),
        "units": (f"{i + 2} cubic kilometers per hour", f"{i + 2} Kubikkilometer pro Stunde"),
        "currencies": (f"€{1000 + i:,}.50", f"{1000 + i:,}".replace(",", ".") + ",50\u00a0€"),
        "time ranges": (
            f"{month} {i % 9 + 1} – {i % 9 + 12}, {1900 + i}",
            f"{i % 9 + 1}.–{i % 9 + 12}. {monat} {1900 + i}",
        ),
        "territories": (f"St. <Territory> & No. {i}", f"St. <Gebiet> & Nr. {i}"),
        "names": (f"Province {i}", f"Provinz {i}"),
    }[kind]


def mistake(text: str, generator: np.random.Generator) -> str:
    edits = [
        text.replace("\u00a0", " ") + ("" if "\u00a0" in text else " der"),
        text.replace("März", "Mai").replace("Stunde", "Sekunde").replace("Nr.", "Nummer")[:-1] + "7",
        " ".join(text.split()[:-1]) or "?",
    ]
    return edits[generator.integers(len(edits))]


def decode(share: float, seed: int) -> list[dict[str, Any]]:
    """Makes samples of a made-up arm; hard examples are hard for every arm, as in reality."""
    hardness, own = np.random.default_rng(0), np.random.default_rng(seed)
    rows = []
    plan = [("validation", kind, i, right) for kind, right in KINDS.items() for i in range(240)]
    for split, kind, i, right in plan + [("unseen names", "names", i, 0.55) for i in range(400)]:
        source, target = phrases(kind, i)
        wrong = (hardness.random() if own.random() < 0.7 else own.random()) > right * share
        prediction = mistake(target, own) if wrong else target
        rows.append(
            {"split": split, "group": kind, "inputs": source, "target": target, "prediction": prediction}
            | {"correct": prediction == target}
        )
    return rows


def scores_of(rows: Sequence[dict[str, Any]]) -> tuple[Any, ...]:
    out: list[Any] = []
    for split in dict.fromkeys(row["split"] for row in rows):
        part = [row for row in rows if row["split"] == split]
        predictions, targets, groups = ([row[key] for row in part] for key in ("prediction", "target", "group"))
        out += score_texts(predictions, targets, groups, split)
    return tuple(out)


def curves(speed: float, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    noise = np.random.default_rng(seed)
    metrics, timings = [], []
    for step in range(1, STEPS + 1):
        loss = 6.9 * np.exp(-step * speed) + 0.04 + 0.9 / (1 + step) * noise.random() + 0.01 * noise.random()
        row = {"step": step, "loss": loss, "grad_norm": 1.0, "tokens": step * TOKENS_A_STEP, "flops": step * 3.417e12}
        row |= {"fingerprint": f"{step:032x}"} | ({"validation_loss": loss * 1.05} if step % 30 == 0 else {})
        metrics.append(row)
        timings.append({"step": step, "seconds": 1.4 * step + 9 + seed, "step_seconds": 1.4, "data_seconds": 0.002})
    return metrics, timings


def config(d_ff: int, kind: str) -> dict[str, Any]:
    model = {"kind": kind, "d_model": 192, "d_ff": d_ff, "num_layers": 4, "norm": "rms", "positions": "rope"}
    data = {"source": {"name": "tfds:cldr_translate/en_de"}, "rows": 16, "tokenizer": {"vocab_size": 1024}, "seed": 0}
    optimizer = {"kind": "adamw", "learning_rate": 2e-3, "betas": [0.9, 0.98]}
    return {"schema_version": 1, "model": model, "data": data, "optimizer": optimizer, "steps": STEPS}


def listed(arm: str, **changes: Any) -> dict[str, Any]:
    """Returns a run as `runs.json` lists it; `changes` replace fields."""
    labels = {"arm": arm, "seed": 0, "learning_rate": 2e-3}
    run = {"name": arm, "arm": arm, "seed": 0, "identity": "00", "folder": arm, "labels": labels, "compared": True}
    return run | changes


@functools.cache
def intact_files() -> str:
    """Returns a JSON object of every file of an intact study by name: an object, or a list for JSON lines."""
    question = "What does the structure of an encoder-decoder buy, at equal data and equal compute?"
    study: dict[str, Any] = {"schema_version": 1, "name": "first light", "question": question}
    study |= {"expected": "Both learn; neither is ahead.", "arms": {}, "seeds": 1, "search": None, "parity": [{}]}
    runs: dict[str, Any] = {"schema_version": 1, "runs": [], "chosen": {}, "complete": True, "overrides": []}
    files: dict[str, Any] = {"study.json": study, "runs.json": runs}
    for i, (arm, d_ff, share) in enumerate([("enc-dec", 512, 1.0), ("dec-only", 464, 0.993)]):
        rows, (metrics, timings) = decode(share, i + 1), curves(0.045 + 0.004 * i, i)
        study["arms"][arm] = config(d_ff, arm)
        runs["runs"].append(listed(arm))
        changes = {"parameters": 2_310_000 - 40_000 * i, "validation_loss": 0.0512 + 0.003 * i}
        files[f"{arm}/result.json"] = dataclasses.asdict(result_of(arm, scores=scores_of(rows), **changes))
        files[f"{arm}/config.json"] = config(d_ff, arm)
        files[f"{arm}/environment.json"] = {
            **{"python": "3.11.9", "jax": "0.10.2", "flax": "0.12.8", "platform": "cpu", "cpu": "Xeon", "threads": 2},
            **{"commit": "0123abc", "content_id": "cldr_translate/en_de:1.0.0+babel2.18", "tokenizer_hash": "f00d"},
        }
        files |= {f"{arm}/metrics.jsonl": metrics, f"{arm}/timings.jsonl": timings, f"{arm}/samples.jsonl": rows}
    return json.dumps(files)


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a study's directory and returns it; `edit(files)` may change the files, JSON values by name."""

    def write(edit: Edit = lambda files: None) -> Path:
        run, files = tmp_path / "run", json.loads(intact_files())
        edit(files)
        for name, value in files.items():
            path = run / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = value if name.endswith(".jsonl") else [value]
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        return run

    return write
