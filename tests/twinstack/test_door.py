"""The public names: what importing them costs, where they are defined, and the snippets that show them."""

import ast
import importlib
import json
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import twinstack
from tests.common.test_imports import TOP, arrows, imported, read_sources
from tests.experiments.test_rooms import ROOMS, SHARED

KEPT = TOP / "tests/data/run_schema_1/gpt"
COMPUTE = {"load", "Policy", "Score"}
"""Names whose modules import JAX."""


def modules_after(*statements: str) -> set[str]:
    """Returns the modules that a new Python has imported after the statements and had not before."""
    program = [
        "import json, sys",
        "before = set(sys.modules)",
        *statements,
        "print(json.dumps(sorted(set(sys.modules) - before)))",
    ]
    command = [sys.executable, "-c", "\n".join(program)]
    return set(json.loads(subprocess.run(command, cwd=TOP, check=True, capture_output=True, text=True).stdout))


def test_importing_it_imports_nothing_else() -> None:
    new = {name.partition(".")[0] for name in modules_after("import twinstack")}
    assert new - set(sys.stdlib_module_names) == {"twinstack"}


def test_configs_need_no_jax() -> None:
    described = ", ".join(sorted(set(twinstack.__all__) - COMPUTE))
    new = modules_after(f"from twinstack import {described}", "GPT.sized(width=64, layers=2, vocab_size=128)")
    assert "gpt.config" in new
    assert not {"jax", "flax", "optax", "orbax"} & new


def test_editors_see_the_same_names() -> None:
    """The imports that only type checkers read are those that happen."""
    tree = ast.parse(Path(twinstack.__file__).read_text())
    [checked] = [node for node in tree.body if isinstance(node, ast.If)]
    read = {
        f"{node.module}.{name.name}" for node in checked.body if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert read == {f"{module}.{name}" for module, names in twinstack.MODULES.items() for name in names.split()}


@pytest.mark.parametrize("module", twinstack.MODULES)
def test_names_are_those_of_their_modules(module: str) -> None:
    for name in twinstack.MODULES[module].split():
        assert getattr(twinstack, name) is getattr(importlib.import_module(module), name)
        assert name in dir(twinstack)


def test_other_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'laod'") as error:
        _ = twinstack.laod
    assert (error.value.name, error.value.obj) == ("laod", twinstack), "Python names the closest one with these"
    with pytest.raises(ImportError, match="Sourceconfig"):
        from twinstack import Sourceconfig  # noqa: F401


def test_a_study_needs_no_other_names_of_common() -> None:
    public = {f"{module}.{name}" for module, names in twinstack.MODULES.items() for name in names.split()}
    studies = [path for path in (TOP / "experiments").glob("*.py") if path.stem not in {"__init__", *SHARED}]
    used = {target for path in studies for target in imported(f"experiments.{path.stem}", path.read_text())}
    assert "common.data.config.DataConfig" in used
    assert {name for name in used if name.startswith("common.")} - public == set()


def test_only_studies_enter_by_the_door() -> None:
    """What the door opens on must not need the door."""
    inner = {name: text for name, text in read_sources("experiments").items() if {*ROOMS, *SHARED} & {*name.split(".")}}
    assert "experiments.models.loading" in inner
    assert not [name for name, target in arrows(inner) if target.partition(".")[0] == "twinstack"]


def snippets() -> list[object]:
    """Returns the indented blocks of the package's docstring and of the README that begin by importing it."""
    found: list[object] = []
    for place, text in {"docstring": twinstack.__doc__ or "", "README": (TOP / "README.md").read_text()}.items():
        block: list[str] = []
        for line in [*text.splitlines(), "end"]:
            if line.startswith("    ") or (block and not line.strip()):
                block.append(line)
                continue
            code = textwrap.dedent("\n".join(block))
            if code.startswith(("import twinstack", "from twinstack import")):
                found.append(pytest.param(code, id=f"{place}-{len(found)}"))
            block = []
    return found


@pytest.mark.parametrize("code", snippets())
def test_snippets_run_as_they_stand(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small trained model at the path that they name."""
    shutil.copytree(KEPT, tmp_path / "runs/first_light/gpt")
    (tmp_path / "snippet.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path("snippet.py")
    assert (len(made["texts"]), len(made["drawn"])) == (2, 3)
    assert all(isinstance(text, str) for text in made["texts"] + made["drawn"])
    scores = [[float(number) for number in line.split()] for line in capsys.readouterr().out.splitlines()]
    assert len(scores) == len(made["pairs"])
    assert sum(x for x, _, _ in scores) == pytest.approx(-made["loss"] * sum(n for _, n, _ in scores))
    assert all(x == pytest.approx(-n * nats) for x, n, nats in scores)
