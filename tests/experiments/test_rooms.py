"""The layout of `experiments/`: studies at the top, in folders below them rooms that import only lower rooms."""

from pathlib import Path

from experiments import find
from tests.common.test_imports import TOP, arrows, read_sources

ROOMS = {
    "models": "finds and converts trained models; with the modules at the top, which name conversions",
    "running": "trains, scores and compares; starts from found models",
    "planning": "predicts cost and memory of what running would do",
    "launching": "submits a run to Cloud TPU, with its plan",
    "cli": "one function per command",
}
"""Folders, lowest first. A room imports itself and those before it."""
SHARED = {"families", "find", "members", "run", "search", "study"}
"""Modules at the top that are not studies."""


def room(module: str) -> str:
    package, _, rest = module.partition(".")
    inner = rest.partition(".")[0]
    return "" if package != "experiments" else inner if inner in ROOMS else "models"


def test_rooms_import_only_those_below() -> None:
    height = {name: place for place, name in enumerate(ROOMS)}
    upward = [
        f"{name} imports {target}"
        for name, target in arrows(read_sources("experiments"))
        if room(target) and height[room(target)] > height[room(name)]
    ]
    assert not upward


def test_at_first_sight_there_are_studies_only() -> None:
    top = {path.stem for path in Path(TOP / "experiments").glob("*.py")} - {"__init__"}
    assert top == {*find.OWN, *SHARED}
    folders = {path.name for path in (TOP / "experiments").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*ROOMS, "results"}
