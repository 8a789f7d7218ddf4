"""How planned programs are compiled: once for equal ones, and from the cache. The compiler's results are made up."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
from rich.console import Console

from common.compute.aot import Compiled
from common.compute.topology import parse_topology
from common.config import from_json, to_json
from common.errors import UserError
from common.files import write_json
from common.train.config import Linear
from experiments.planning import compiling
from experiments.planning.compiling import PlannedProgram
from experiments.running import pipeline
from experiments.study import Study
from tests.experiments.planning.compiled import FITS, TOO_LARGE, V5E
from tests.experiments.tiny_study import tiny_study, with_data, with_train


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return tiny_study(tmp_path)


def test_without_libtpu_one_line_names_what_to_install(monkeypatch, study) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        compiling.compile_all([PlannedProgram(name="gpt", run=study.arms["gpt"], topology=V5E)], Console())


def test_the_cache_key_depends_on_what_the_program_depends_on(monkeypatch, study) -> None:
    """Names, data sources, seeds and schedules change nothing; sizes, topology and versions do."""
    monkeypatch.setattr(compiling.importlib.metadata, "version", lambda name: "1")
    run = study.arms["gpt"]
    program = PlannedProgram(name="gpt", run=run, topology=V5E)
    source = dataclasses.replace(run.data.source, name="jsonl:other")
    renamed = dataclasses.replace(with_data(run, source=source), labels={"width": 16}, about="?")
    renamed = with_train(renamed, seed=1, schedule=Linear(), validate_every=7)
    assert dataclasses.replace(program, name="other", run=renamed).key() == program.key()
    others = [
        dataclasses.replace(program, run=study.arms["t5like"]),
        dataclasses.replace(program, topology=parse_topology("v5p:2x2x1")),
        dataclasses.replace(program, run=with_data(run, rows=8)),
        dataclasses.replace(program, run=with_train(run, accumulation=2)),
    ]
    monkeypatch.setattr(compiling.importlib.metadata, "version", lambda name: "1")
    keys = {program.key(), *(other.key() for other in others)}
    monkeypatch.setattr(compiling.importlib.metadata, "version", lambda name: "2")
    assert len(keys | {program.key()}) == 6


def test_the_cache_key_depends_on_every_module_that_makes_the_program() -> None:
    """Checked for every module of this project that the tests have loaded, which includes all that a compiler loads."""
    loaded = {Path(found) for module in list(sys.modules.values()) if (found := getattr(module, "__file__", None))}
    packages = [compiling.ROOT / name for name in ("common", "experiments", "gpt", "t5like")]
    ours = {file for file in loaded if any(file.is_relative_to(package) for package in packages)}
    assert Path(pipeline.__file__) in ours
    assert ours <= set(compiling._source_files())


def test_results_survive_json() -> None:
    assert from_json(Compiled, to_json(FITS)) == FITS
    assert from_json(Compiled, to_json(TOO_LARGE)) == TOO_LARGE


def test_equal_programs_are_compiled_once(monkeypatch, study, tmp_path) -> None:
    """Arms that differ only in their learning rate and labels have the same program."""
    monkeypatch.setenv("TWINSTACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(compiling.importlib.metadata, "version", lambda name: "1")
    compiled: list[PlannedProgram] = []

    def compile_(missing: dict[Path, PlannedProgram], console: Console) -> None:
        for path, program in missing.items():
            compiled.append(program)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, to_json(FITS))

    monkeypatch.setattr(compiling, "_compile_missing", compile_)
    run = study.arms["gpt"]
    faster = dataclasses.replace(run, learning_rate=1.0, labels={"rate": "high"})
    programs = [PlannedProgram(name=name, run=run, topology=V5E) for name, run in (("a", run), ("b", faster))]
    assert compiling.compile_all(programs, Console()) == [FITS, FITS]
    assert [program.name for program in compiled] == ["a"]
