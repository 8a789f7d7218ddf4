"""Configs of streams over the text files of the fixture `folder`."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from common.data.batch import HostBatch
from common.data.config import DataConfig, SentencePieceConfig
from common.data.objectives.config import (
    Objective,
)
from common.data.sources.config import SourceConfig, SourceMixture, Template

LINES = [" ".join(f"{n} is {n + 1} less one" for n in range(i % 9)) + f" end {i}" for i in range(300)]
ROWS, SLOTS = 8, 64


def text(folder: Path, name: str = "lines") -> SourceConfig:
    return SourceConfig(name=f"text:{folder}/{name}.{{split}}.txt", inputs=None, targets=None, text="text")


def pairs(folder: Path, *templates: Template) -> SourceConfig:
    fields: dict[str, Any] = {"inputs": None, "targets": None} if templates else {"inputs": "a", "targets": "b"}
    return SourceConfig(name=f"jsonl:{folder}/pairs.{{split}}.jsonl", templates=templates, **fields)


def config_of(source: SourceConfig | SourceMixture, objective: Objective, **change: Any) -> DataConfig:
    given = {"rows": ROWS, "input_length": SLOTS, "target_length": SLOTS, "seed": 1, **change}
    return DataConfig(source=source, objective=objective, tokenizer=SentencePieceConfig(path="given"), **given)


def digest(*batches: HostBatch) -> str:
    arrays = [getattr(each.batch, field.name) for each in batches for field in dataclasses.fields(each.batch)]
    return hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in arrays)).hexdigest()


def mixture(folder: Path, **change: Any) -> SourceMixture:
    return SourceMixture(parts=(text(folder), text(folder, "few")), **change)
